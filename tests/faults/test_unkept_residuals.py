"""A device that cannot keep what its messages leave out answers all the same, and is named."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from fedserver import events
from fedserver.configuration import parse
from fedserver.ledger import Ledger
from simulations.run import simulate


def _file_in_the_way(residuals: Path, run: str, node: str) -> None:
    residuals.write_text("no folder")


def _folder_that_takes_no_file(residuals: Path, run: str, node: str) -> None:
    # As the disk's limits are no limits to root, whom a test may run as; /proc is.
    (residuals / run).mkdir(parents=True)
    own = residuals / run / hashlib.sha256(node.encode()).hexdigest()[:16]
    own.symlink_to("/proc/self", target_is_directory=True)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no file")
@pytest.mark.parametrize("spoil", [_file_in_the_way, _folder_that_takes_no_file])
def test_an_answer_needs_no_room_for_what_it_leaves_out(
    spoil: Any,
    tiny_model_folder: Path,
    tiny_data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("FEDBRAID_CACHE", str(cache))
    configuration = parse({
        "base_model": str(tiny_model_folder), "preset": "mixed", "rounds": 2, "threads": 1,
        "local_steps": 1, "max_length": 48, "evaluate": False,
        "data": {"source": str(tiny_data_file), "held_out_max": 2, "limit_per_node": 12},
        "projected": {"within_basis": False, "learning_rate": 1e-3},
        "nodes": [{"name": "full", "strand": "projected"}],
    })  # fmt: skip
    cache.mkdir()
    spoil(cache / "residuals", configuration.run_id(), "full")
    told: list[str] = []

    def hear(event: events.Event) -> None:
        if isinstance(event, events.Notice) and event.level == "warning":
            told.append(event.text)

    simulate(configuration, tmp_path / "run", hear, samples=0)
    ledger = Ledger(tmp_path / "run")
    rows = [row for entry in ledger.entries("round") for row in entry.content["nodes"]]
    ledger.close()
    assert [(row["verdict"], row["reason"]) for row in rows] == [("accepted", "")] * 2
    (warning,) = [text for text in told if "left out" in text]
    assert "full no longer has what its message of round 1 left out" in warning
