"""SIGKILL at any moment, then --resume: the same ledger head as an uninterrupted run."""

from __future__ import annotations

from pathlib import Path

from simulations.benchmarks.resume import survive


def test_kills_at_random_moments_change_nothing(tiny_scenario: Path, tmp_path: Path) -> None:
    found = survive(str(tiny_scenario), ["rounds=4"], tmp_path / "runs", kills=50, seed=2)
    assert found.kills == 50
    assert found.finished >= 1
    assert found.problems == ()
    assert set(found.heads) == {found.expected}
