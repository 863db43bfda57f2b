"""SIGKILL in a real deployment: the stub in its message, then the ServerApp in a round."""

from __future__ import annotations

import tempfile
from pathlib import Path

from simulations.benchmarks.crash import survive


def test_killed_processes_lose_and_double_nothing() -> None:
    # The path of a Unix socket is short, and a test's own folder is not.
    with tempfile.TemporaryDirectory() as folder:
        found = survive(
            Path(folder), kills=2, rounds=2, pause=(0.0, 0.1), victims=("stub", "serverapp"), seed=1
        )
    assert sum(found.killed.values()) == 2
    assert found.problems == []
    assert set(found.heads) == {found.expected}
