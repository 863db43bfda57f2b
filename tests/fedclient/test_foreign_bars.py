"""Libraries' own progress bars are hidden where asked, and nowhere else."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from tqdm import tqdm

from fedclient.foreign_bars import hidden


def a_module() -> Any:
    module = ModuleType("theirs")
    module.__dict__["tqdm"] = tqdm
    return module


def test_hidden_inside_and_drawn_outside(capsys: pytest.CaptureFixture[str]) -> None:
    module = a_module()
    with hidden(module):
        assert list(module.tqdm(range(3), desc="theirs")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(module.tqdm(range(3), desc="theirs")) == [0, 1, 2]
    assert "theirs" in capsys.readouterr().err


def test_restored_after_an_error() -> None:
    module = a_module()
    with pytest.raises(ZeroDivisionError), hidden(module):
        raise ZeroDivisionError
    assert module.tqdm is tqdm


def test_a_module_without_bars() -> None:
    module = ModuleType("quiet")
    with hidden(module):
        assert not hasattr(module, "tqdm")
    assert not hasattr(module, "tqdm")
