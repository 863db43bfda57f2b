"""What a node keeps between rounds: the round asked again finds what it found the first time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedclient.residual import Residuals


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Residuals:
    monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path))
    return Residuals("a-run", "ward 3/west")


def left(value: float) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((2, 3), value)}


def found(kept: Residuals, round_number: int) -> float | None:
    values = kept.before(round_number)
    return float(values["layer.weight"][0, 0]) if values else None


def test_a_round_finds_what_the_one_before_left(kept: Residuals) -> None:
    assert found(kept, 1) is None
    for number in (1, 2, 3):
        kept.keep(number, left(number))
    assert found(kept, 4) == 3.0
    assert found(Residuals("a-run", "ward 3/west"), 4) == 3.0
    assert found(Residuals("a-run", "ward 4"), 4) is None
    assert found(Residuals("b-run", "ward 3/west"), 4) is None


def test_a_round_that_is_asked_again_finds_the_same(kept: Residuals) -> None:
    kept.keep(1, left(1))
    assert found(kept, 2) == 1.0
    kept.keep(2, left(2))
    # The node was killed before its reply arrived, and round 2 begins anew.
    assert found(kept, 2) == 1.0


def test_a_round_that_a_node_missed_is_passed_over(kept: Residuals) -> None:
    kept.keep(1, left(1))
    kept.keep(2, left(2))
    assert found(kept, 6) == 2.0


def test_an_earlier_run_of_the_same_scenario_is_forgotten(kept: Residuals) -> None:
    for number in (1, 2, 3):
        kept.keep(number, left(number))
    assert found(kept, 1) is None
    assert found(kept, 4) is None


def test_a_damaged_file_is_as_none(kept: Residuals, tmp_path: Path) -> None:
    kept.keep(1, left(1))
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"half a file")
    assert found(kept, 2) is None


WRITER = """
import itertools, torch
from fedclient.residual import Residuals
kept = Residuals("a-run", "node")
for number in itertools.count(1):
    kept.keep(number, {"weight": torch.full((700, 700), float(number % 100))})
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_residual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        written = [int(writer.stdout.readline()) for _ in range(5)]
        writer.kill()
    kept = Residuals("a-run", "node").before(10**6)["weight"]
    assert kept.unique().numel() == 1
    assert float(kept[0, 0]) >= written[-1] % 100
    assert not list(tmp_path.rglob("*.part"))
