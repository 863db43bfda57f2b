"""Edge aggregators between nodes and server: the model is the flat run's, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedserver import events
from fedserver.configuration import RunConfiguration, parse
from fedserver.control import ControlQueue
from fedserver.ledger import Ledger
from fedserver.replay import replay
from simulations.run import simulate

EDGES = [
    {"name": "hospital", "nodes": ["clinic", "school", "phone"]},
    {"name": "campus", "nodes": ["ward", "office", "cafe"]},
]
NODES: list[dict[str, Any]] = [
    {"name": "clinic", "lora_r": 4},
    {"name": "ward"},
    {"name": "bakery"},
    {"name": "school", "strand": "projected"},
    {"name": "office", "strand": "projected"},
    {"name": "phone", "strand": "zeroth-order", "local_steps": 2},
    {"name": "cafe", "strand": "zeroth-order", "local_steps": 2},
]
# Every way of making updates that add, in as few runs.
WAYS: dict[str, dict[str, Any]] = {
    "adaptive basis, drawn seeds, overlap": {
        "zeroth_order": {"sampling": "magnitude", "clip": 100.0},
        "mixing": {"rule": "overlap"},
        "participation": 0.8,
    },
    "random probes a node, hybrid, one mean": {
        "zeroth_order": {"estimator": "hybrid"},
        "projected": {"basis": "random", "coordinates": 200, "seeds": "per-node"},
        "mixing": {"rule": "mean"},
        "signatures": "required",
    },
}


@pytest.fixture
def run(
    tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    def make(
        name: str, emit: events.Listener = lambda event: None, **changes: Any
    ) -> tuple[Path, RunConfiguration, dict[str, Any]]:
        # What nodes keep for error feedback is filed by run, and both runs are the same one.
        monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path / f"cache-{name}"))
        configuration = parse(
            {
                "base_model": str(tiny_model_folder),
                "preset": "mixed",
                "rounds": 2,
                "threads": 1,
                "seed": 4,
                "local_steps": 2,
                "max_length": 48,
                "lora_r": 3,
                "view_rank": 6,
                "micro_batch_size": 4,
                "data": {"source": str(tiny_data_file), "held_out_max": 3, "limit_per_node": 16},
                "nodes": NODES,
            }
            | changes
        )
        folder = tmp_path / name
        return folder, configuration, simulate(configuration, folder, emit, samples=0)

    return make


def rounds(folder: Path) -> list[dict[str, Any]]:
    ledger = Ledger(folder)
    try:
        return [entry.content for entry in ledger.entries("round")]
    finally:
        ledger.close()


def last_evaluation(folder: Path) -> dict[str, Any]:
    ledger = Ledger(folder)
    try:
        found = ledger.last("evaluation")
        assert found is not None
        sums: dict[str, Any] = found.content["entering"]
        return sums
    finally:
        ledger.close()


@pytest.mark.parametrize("way", WAYS)
def test_two_levels_give_the_flat_run_s_model(run: Any, way: str) -> None:
    flat_folder, configuration, flat = run("flat", **WAYS[way])
    folder, edged, summary = run("edged", **WAYS[way], edges=EDGES)
    assert edged.run_id() == configuration.run_id()
    one, two = rounds(flat_folder), rounds(folder)
    assert [entry["state"] for entry in two] == [entry["state"] for entry in one]
    for key, value in last_evaluation(flat_folder).items():
        assert last_evaluation(folder)[key] == pytest.approx(value, rel=1e-12)
    assert summary["families"].keys() == flat["families"].keys()
    for entry, lone in zip(two, one, strict=True):
        names = {row["node"]: row for row in lone["nodes"]}
        told = {}
        for row in entry["nodes"]:
            for member in row.get("members", [row]):
                told[member["node"]] = member
        assert told.keys() == names.keys()
        for name, member in told.items():
            assert member["verdict"] == "accepted"
            assert member["bytes_up"] == names[name]["bytes_up"]
    ledger = Ledger(folder)
    try:
        assert all(one.equal for one in replay(ledger, edged))
        assert ledger.verify() == []
    finally:
        ledger.close()


def test_a_device_that_fails_costs_its_edge_nothing_else(run: Any) -> None:
    faults = {"clinic": "nan", "school": "crash", "cafe": "never"}
    nodes = [node | {"fault": faults.get(node["name"])} for node in NODES]
    folder, _, _ = run("edged", edges=EDGES, nodes=nodes, quorum=4)
    flat_folder, _, _ = run("flat", nodes=nodes, quorum=4)
    one, two = rounds(flat_folder), rounds(folder)
    assert [entry["state"] for entry in two] == [entry["state"] for entry in one]
    told = {
        member["node"]: member["verdict"]
        for row in two[0]["nodes"]
        for member in row.get("members", [])
    }
    assert {name: told[name] for name in faults} == {
        "clinic": "not_finite",
        "school": "failed",
        "cafe": "missing",
    }
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(lines[-1])["families"].values()) == 4


def test_operators_take_out_devices_and_whole_edges(run: Any, tmp_path: Path) -> None:
    """Who is revoked behind an edge is asked for nothing more, the last evaluation included."""

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundCommitted) and event.round == 1:
            for action, node in (("revoke", "clinic"), ("drain", "cafe"), ("quarantine", "hall")):
                arguments = {"node": node}
                queue = ControlQueue(tmp_path / "edged")
                queue.ask(action, arguments, who="eve", role="operator", reason="a test")

    edges = [EDGES[0], {"name": "campus", "nodes": ["cafe"]}, {"name": "hall", "nodes": ["ward"]}]
    nodes = [{"name": name} for name in ("clinic", "school", "phone", "cafe", "ward", "office")]
    folder, _, _ = run("edged", listen, edges=edges, nodes=nodes, quorum=1, evaluate=True)

    def asked(content: dict[str, Any]) -> set[str]:
        found = set()
        for row in content["nodes"]:
            groups = row["plan"]["method"].get("groups")
            members = [m[0] for g in groups for m in g["members"]] if groups else [row["node"]]
            found |= set(members)
        return found

    one, two = rounds(folder)
    assert asked(one) == {node["name"] for node in nodes}
    assert asked(two) == {"school", "phone", "office"}
    ledger = Ledger(folder)
    try:
        last = ledger.last("evaluation")
    finally:
        ledger.close()
    assert last is not None
    assert asked(last.content) == {"school", "phone", "office"}
