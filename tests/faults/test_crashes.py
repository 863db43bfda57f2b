"""SIGKILL in a real deployment: the stub in its message, then the ServerApp in a round."""

from __future__ import annotations

from pathlib import Path

from simulations.benchmarks.crash import survive


def test_killed_processes_lose_and_double_nothing(tmp_path: Path) -> None:
    found = survive(
        tmp_path, kills=2, rounds=2, pause=(0.0, 0.1), victims=("stub", "serverapp"), seed=1
    )
    assert sum(found.killed.values()) == 2
    assert found.problems == []
    assert set(found.heads) == {found.expected}
