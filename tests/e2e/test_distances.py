"""Distances of a real round: the outlier is found, and nothing is changed by looking."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aggregators import SeedScalars
from fedserver import events
from fedserver.configuration import parse
from fedserver.control import OPERATOR, ControlQueue
from fedserver.distances import COMPARED, READ, measure
from fedserver.ledger import Ledger
from fedserver.replay import accepted_updates
from fedserver.run_folder import recorded_configuration
from simulations.command import main
from simulations.run import simulate

NODES: list[dict[str, Any]] = [
    *({"name": f"lora-{n}", "lora_r": n + 2} for n in range(3)),
    {"name": "lora-loud", "learning_rate": 2e-2},
    *({"name": f"zeroth-{n}", "strand": "zeroth-order"} for n in range(3)),
    *({"name": f"projected-{n}", "strand": "projected"} for n in range(3)),
    {"name": "projected-loud", "strand": "projected", "learning_rate": 5e-3},
]
EDGES = [{"name": "campus", "nodes": ["zeroth-0", "projected-0"]}]


@pytest.fixture
def run(
    tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path / "cache"))

    def make(emit: events.Listener = _silent, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "base_model": str(tiny_model_folder),
            "preset": "mixed",
            "rounds": 3,
            "threads": 1,
            "seed": 4,
            "local_steps": 2,
            "max_length": 48,
            "lora_r": 3,
            "micro_batch_size": 4,
            "evaluate": False,
            "contributions": False,
            "data": {"source": str(tiny_data_file), "held_out_max": 3, "limit_per_node": 16},
            "zeroth_order": {"learning_rate": 1e-3, "pool_size": 64, "local_steps": 3},
            "projected": {"learning_rate": 1e-3},
            "nodes": NODES,
        }
        simulate(parse(values | changes), tmp_path / "run", emit, samples=0)
        return tmp_path / "run"

    return make


def command(words: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


def test_outliers_stand_out_in_their_families_and_nothing_is_written(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run()
    ledger = Ledger(folder)
    before, metrics = ledger.head, (folder / "metrics.jsonl").read_bytes()
    configuration, told = recorded_configuration(ledger), []
    for number in (1, 2, None):  # the state before round 2 is not kept any more
        entry, found = measure(ledger, configuration, number, lambda *one: told.append(one))
        assert entry.round == (number or 3)
        assert len(found) == len(NODES)
        assert {READ, COMPARED} == {what for what, *_ in told}
        assert all(0 <= done <= of for _, done, of in told)
        norms = {row["node"]: row["norm"] for row in entry.content["nodes"]}
        for family in {one.family for one in found}:
            members = [one for one in found if one.family == family]
            assert sum(one.share for one in members) == pytest.approx(1.0)
            far = [one.node for one in members if (one.over_median or 0.0) > 1.7]
            # A walk of three steps is as long as its slopes happen to be.
            if family != SeedScalars.family:
                assert far == [one.node for one in members if one.node.endswith("loud")] != []
            for one in members:
                assert one.norm == pytest.approx(norms[one.node], rel=1e-6)
                assert one.cosine is not None
                assert not one.edge
    assert (ledger.head, (folder / "metrics.jsonl").read_bytes()) == (before, metrics)
    ledger.close()
    capsys.readouterr()
    assert command(["ledger", "distances", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == [
        pytest.approx({"round": 3, "entry": entry.hash, **vars(one)}) for one in found
    ]
    assert json.loads(printed.err.splitlines()[-1])["event"] == "progress"
    assert command(["ledger", "distances", str(folder), "--round", "1"]) == 0
    assert "projected-loud" in capsys.readouterr().out


def test_what_cannot_be_measured_is_said_in_one_line(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(nodes=[*NODES[:2], {"name": "mute", "fault": "never"}], rounds=2)
    ledger = Ledger(folder)
    configuration = recorded_configuration(ledger)
    _, found = measure(ledger, configuration)
    assert [one.node for one in found] == ["lora-0", "lora-1"]
    blobs = {
        number: ledger.blobs.path(accepted_updates(ledger.round(number))[0]["update"])
        for number in (1, 2)
    }
    ledger.close()

    def refusal(*words: str) -> str:
        capsys.readouterr()
        assert command(["ledger", "distances", str(folder), *words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "round 9 is not in the ledger" in refusal("--round", "9")
    data = blobs[2].read_bytes()
    blobs[2].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "was changed on disk" in refusal()
    # The other round's updates are as they were.
    assert command(["ledger", "distances", str(folder), "--round", "1"]) == 0
    blobs[1].unlink()
    line = refusal("--round", "1")
    assert "lora-0" in line
    assert "not kept" in line
    blobs[2].write_bytes(data)
    assert command(["ledger", "distances", str(folder)]) == 0
    database = sqlite3.connect(folder / "ledger.db")
    database.execute(
        "UPDATE entries SET content = replace(content, 'lora-0', 'lora-1') WHERE kind = 'round'"
    )
    database.commit()
    database.close()
    assert "is not sound" in refusal()


def test_after_a_roll_back_sketches_are_of_the_basis_that_came_back(
    run: Any, tmp_path: Path
) -> None:
    """The gate takes no sketch of another one; whether the state was kept or is made again."""

    def emit(event: events.Event) -> None:
        if event == events.RoundStarted(3):
            ControlQueue(tmp_path / "run").ask(
                "rollback", {"round": 1}, who="eve", role="operator", reason="a test"
            )

    folder = run(emit, nodes=[n for n in NODES if n.get("strand") == "projected"], rounds=4)
    ledger = Ledger(folder)
    assert [entry.content["action"] for entry in ledger.entries(OPERATOR)] == ["rollback"]
    for number in range(1, 5):
        entry, found = measure(ledger, recorded_configuration(ledger), number)
        assert (entry.round, len(found)) == (number, 4)
    ledger.close()


def test_of_an_edge_its_sum_is_measured_and_said_to_be_one(run: Any) -> None:
    """Of projections along probes of their own it has a sum for each device."""
    nodes = [n for n in NODES if not n["name"].endswith(("2", "loud"))]
    changes = {"projected": {"basis": "random", "coordinates": 200, "seeds": "per-node"}}
    folder = run(
        nodes=nodes,
        edges=EDGES,
        rounds=1,
        zeroth_order={"estimator": "hybrid", "learning_rate": 1e-3, "pool_size": 64},
        **changes,
    )
    ledger = Ledger(folder)
    _, found = measure(ledger, recorded_configuration(ledger))
    assert {(one.node, one.family) for one in found if one.edge} == {
        ("campus", "seed_scalars"),
        ("campus", "low_rank"),
        ("campus", "projected_gradient"),
    }
    # A hybrid node is in the mean of both of its families.
    assert [one.family for one in found if one.node == "zeroth-1"] == ["low_rank", "seed_scalars"]
    ledger.close()


def test_a_late_update_is_measured_as_it_entered(run: Any) -> None:
    folder = run(
        nodes=[*NODES[:2], {"name": "slow", "fault": "late"}],
        quorum=2,
        late="discount",
        rounds=2,
    )
    ledger = Ledger(folder)
    entry, found = measure(ledger, recorded_configuration(ledger))
    (row,) = [row for row in accepted_updates(entry) if row["node"] == "slow"]
    assert row["discount"] < 1
    (late,) = [one for one in found if one.node == "slow"]
    assert late.norm == pytest.approx(row["norm"] * row["discount"], rel=1e-6)
    ledger.close()


def _silent(event: events.Event) -> None:
    pass
