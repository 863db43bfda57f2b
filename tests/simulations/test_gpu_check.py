"""The GPU check compares every kernel, and without a GPU says that nothing was measured."""

from __future__ import annotations

import sys

import pytest
import torch

import fedkernels as fk
from simulations.benchmarks import gpu_check


def test_all_comparisons_agree():
    if "triton" not in fk.backends():
        return  # no Triton on this platform: the next test is what is left of the command
    from simulations.benchmarks.gpu.correctness import checks

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = list(checks(device, 14))
    assert len(results) > 100
    assert not [check for check in results if not check.passed]


@pytest.mark.parametrize("absent", ["GPU", "Triton"])
def test_without_a_gpu_nothing_is_measured_and_that_is_no_error(monkeypatch, capsys, absent):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    if absent == "Triton":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu_check.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "nothing was measured" in lines[0]
