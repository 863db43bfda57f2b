"""Three kinds of updates in one round, end to end: exact, the same on replay, resume and every node."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aggregators import LowRank, ProjectedGradient, SeedScalars, Sketch
from aggregators.gate import GateContext, admit
from aggregators.messages import Capabilities, Plan, encode_plan
from aggregators.presets import PRESETS
from aggregators.projected import shrinkage
from fedclient import state
from fedclient.node import NodeSettings
from fedclient.worker import Worker
from fedserver.configuration import ConfigurationError, RunConfiguration, parse, to_toml
from fedserver.events import Event, NodeStarted, Notice
from fedserver.export import export_merged, final_change
from fedserver.global_model import GlobalModel, first_basis
from fedserver.ledger import Ledger, LedgerError
from fedserver.planner import make_plan
from fedserver.replay import replay, states
from fedserver.run_folder import read_layout, recorded_configuration
from simulations.run import ledger_head, simulate

NODES = (
    {"name": "clinic"},
    {"name": "school", "strand": "projected"},
    {"name": "office", "strand": "projected"},
    {"name": "phone", "strand": "zeroth-order"},
    {"name": "cafe", "strand": "zeroth-order"},
)

FORMATS = (
    {"name": "clinic", "base_format": "nf4"},
    {"name": "bakery", "base_format": "nf4"},
    {"name": "school", "strand": "projected"},
    {"name": "phone", "strand": "zeroth-order", "base_format": "nf4"},
    {"name": "watch", "strand": "zeroth-order", "base_format": "int8"},
    {"name": "cafe", "strand": "zeroth-order"},
)


@pytest.fixture
def configuration(
    tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path / "cache"))

    def make(**changes: Any) -> RunConfiguration:
        values: dict[str, Any] = {
            "base_model": str(tiny_model_folder),
            "preset": "mixed",
            "rounds": 3,
            "threads": 1,
            "seed": 4,
            "local_steps": 2,
            "max_length": 48,
            "lora_r": 3,
            "view_rank": 6,
            "micro_batch_size": 4,
            "data": {"source": str(tiny_data_file), "held_out_max": 3, "limit_per_node": 16},
            "zeroth_order": {"learning_rate": 1e-3, "pool_size": 64, "local_steps": 3},
            "projected": {"learning_rate": 1e-3, "coordinates": 200},
            "nodes": NODES,
        }
        return parse(values | changes)

    return make


def run(configuration: RunConfiguration, folder: Path, **options: Any) -> dict[str, Any]:
    return simulate(configuration, folder, lambda event: None, samples=0, **options)


@pytest.mark.parametrize(
    ("basis", "nodes"), [("adaptive", NODES), ("random", NODES), ("adaptive", FORMATS)]
)
def test_a_round_adds_the_mean_of_every_family(
    basis: str, nodes: Any, configuration: Any, tmp_path: Path
) -> None:
    """Law 2: the state's change is the sum of the families' weighted means, in float64."""
    asked = configuration(nodes=nodes)
    asked = asked.model_copy(
        update={"projected": asked.projected.model_copy(update={"basis": basis})}
    )
    run(asked, tmp_path / "run")
    ledger = Ledger(tmp_path / "run")
    layout = read_layout(ledger)
    expected: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    before = GlobalModel.empty(layout)
    for entry, (_, after) in zip(ledger.entries("round"), states(ledger, asked), strict=True):
        in_use = before.basis or first_basis(asked, layout)
        for name, change in _mean_changes(entry.content["nodes"], ledger, asked, in_use).items():
            expected[name] = expected[name] + change
        before = after
    ledger.close()
    _, view = final_change(tmp_path / "run", exact=True)
    names = {spec.name for spec in layout}
    assert set(expected) == names
    for name, change in expected.items():
        weight = torch.zeros(layout.shape(name))
        found = view.moved(name, weight).double()
        assert float((found - change).norm()) <= 1e-5 * float(change.norm()), name


def _mean_changes(
    nodes: list[dict[str, Any]], ledger: Ledger, asked: RunConfiguration, basis: Any
) -> dict[str, torch.Tensor]:
    """The mixing rule by its definition: dense, float64, a family at a time."""
    layout = read_layout(ledger)
    groups: dict[str, list[tuple[Any, int]]] = defaultdict(list)
    for node in nodes:
        plan = Plan.model_validate(node["plan"])
        admitted = admit(ledger.get(node["update"]), GateContext(layout, plan, basis=basis))
        groups[plan.family].append((admitted.update, admitted.report.examples))
    total: dict[str, torch.Tensor] = {}
    for members in groups.values():
        examples = sum(count for _, count in members)
        mean = None
        for update, count in members:
            part = update * (count / examples)
            mean = part if mean is None else mean + part
        for name, change in _dense(mean, basis, asked).items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + change
    return total


def _dense(mean: Any, basis: Any, asked: RunConfiguration) -> dict[str, torch.Tensor]:
    if isinstance(mean, Sketch):
        assert basis is not None
        return {
            **mean.reconstruct(basis, asked.projected.within).dense(),
            **mean.whole_change().dense(),
        }
    dense: dict[str, torch.Tensor] = mean.dense()
    if isinstance(mean, ProjectedGradient):
        for name, count in mean.counts.items():
            dense[name] = dense[name] * shrinkage(count, dense[name].numel(), mean.probe)
    assert isinstance(mean, (LowRank, SeedScalars, ProjectedGradient))
    return dense


def test_a_mixed_ledger_replays_and_says_what_each_family_is_worth(
    configuration: Any, tmp_path: Path
) -> None:
    asked = configuration(contributions=True)
    summary = run(asked, tmp_path / "run")
    ledger = Ledger(tmp_path / "run")
    assert ledger.verify() == []
    assert all(one.equal for one in replay(ledger, asked))
    ledger.close()
    families = summary["families"]
    assert {name: one["nodes"] for name, one in families.items()} == {
        "low_rank": 1, "seed_scalars": 2, "sketch": 2,
    }  # fmt: skip
    for one in families.values():
        assert one["updates"] == 3 * one["nodes"]
        assert one["contribution"] is not None
    assert families["seed_scalars"]["bytes_up"] < families["low_rank"]["bytes_up"] / 3
    assert families["sketch"]["contribution"] > 0


def test_every_node_makes_the_same_weights_of_the_same_view(
    configuration: Any, tmp_path: Path
) -> None:
    """Ten rounds with joins, absences and a restart: in each, whoever is there has one weight digest.

    The school joins in round 5, the office and the phone come and go, and the café answers late. The
    whole cohort starts afresh, without what it kept in memory, after round 6; the digests, and the
    ledger's head, are those of a cohort that did not.
    """
    absences = {"school": (1, 2, 3, 4), "office": (3, 7), "phone": (2, 5, 6, 9)}
    nodes = tuple(
        {**node, "away": absences.get(node["name"], ())}
        | ({"fault": "late"} if node["name"] == "cafe" else {})
        for node in NODES
    )
    asked = configuration(rounds=10, nodes=nodes, deadline_seconds=60.0, quorum=1)
    simulate(asked, tmp_path / "run", _each_on_its_own, samples=0)
    digests = _weight_digests(tmp_path / "run")
    assert [len(found) for found in digests] == [1] * 10
    assert len(set().union(*digests)) == 10, "the model did not move in some round"
    run(asked.model_copy(update={"rounds": 6}), tmp_path / "restarted")
    scenario, folder = tmp_path / "scenario.toml", tmp_path / "restarted"
    scenario.write_text(to_toml(asked), encoding="utf-8")
    command = ["simulate", str(scenario), "--output", str(folder), "--resume", "--json"]
    subprocess.run([sys.executable, "-m", "simulations.command", *command], check=True)
    assert _weight_digests(folder) == digests


def _each_on_its_own(event: Event) -> None:
    """Nodes of one process share the weights that they make; here each has to make its own."""
    if isinstance(event, NodeStarted):
        state.forget()


def _weight_digests(folder: Path) -> list[set[str]]:
    """By round: the digests of the weights that accepted nodes with full weights worked on."""
    ledger = Ledger(folder)
    found = []
    for entry in ledger.entries("round"):
        rows = [n for n in entry.content["nodes"] if n["verdict"] == "accepted"]
        found.append({n["report"]["weights"] for n in rows} - {None})
    ledger.close()
    return found


def test_nodes_of_one_format_have_one_digest_and_one_line_of_the_evaluation(
    configuration: Any, tmp_path: Path
) -> None:
    """Whole and quantised bases in one cohort, all strands that each can have, a node that is away."""
    nodes = (*FORMATS, {**FORMATS[3], "name": "tablet", "fault": "late"})
    run(configuration(rounds=4, nodes=nodes, deadline_seconds=60.0), tmp_path / "run")
    ledger = Ledger(tmp_path / "run")
    for entry in ledger.entries("round"):
        accepted = [n for n in entry.content["nodes"] if n["verdict"] == "accepted"]
        assert len(accepted) >= len(FORMATS)
        digests: dict[str, set[str]] = defaultdict(set)
        for node in accepted:
            assert node["base_format"] == node["report"]["base_format"]
            digests[node["base_format"]].add(node["report"]["weights"])
        # A whole base that nothing has changed is not made anew, so a LoRA node says nothing of it.
        assert [len(found - {None}) for found in digests.values()] == [1, 1, 1]
        assert len(set.union(*digests.values()) - {None}) == 3
        parts = entry.content["entering_by_format"]
        assert set(parts) == {"full", "int8", "nf4"}
        for key in ("tokens", "correct", "examples"):
            assert sum(one[key] for one in parts.values()) == entry.content["entering"][key]
    ledger.close()
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = rows[-1]["eval_by_format"]
    assert min(losses.values()) <= rows[-1]["eval_loss"] <= max(losses.values())


def test_a_mixed_run_that_is_resumed_is_the_run_that_was_not(
    configuration: Any, tmp_path: Path
) -> None:
    """Also what nodes keep for themselves, the residuals, comes back."""
    whole = configuration(evaluate=False)
    run(whole, tmp_path / "whole")
    run(whole.model_copy(update={"rounds": 2}), tmp_path / "parts")
    run(whole, tmp_path / "parts", resume=True)
    assert ledger_head(tmp_path / "parts") == ledger_head(tmp_path / "whole")


@pytest.mark.parametrize("basis", ["adaptive", "random"])
def test_a_copy_that_trained_in_between_changes_nothing(
    basis: str, configuration: Any, tmp_path: Path
) -> None:
    """The same devices train another copy of the scenario, to its end, before a run is resumed."""
    whole = configuration(
        evaluate=False, rounds=5, nodes=NODES[:3],
        # Within the basis nothing is left out, so nothing would be kept.
        projected={"learning_rate": 1e-3, "coordinates": 200, "basis": basis, "within_basis": False},
    )  # fmt: skip
    run(whole.model_copy(update={"rounds": 2}), tmp_path / "parts")
    run(whole, tmp_path / "copy")
    told: list[Event] = []
    simulate(whole, tmp_path / "parts", told.append, samples=0, resume=True)
    assert ledger_head(tmp_path / "parts") == ledger_head(tmp_path / "copy")
    assert not [event for event in told if isinstance(event, Notice) and event.level == "warning"]


def test_a_device_that_lost_its_residuals_says_so(configuration: Any, tmp_path: Path) -> None:
    whole = configuration(
        evaluate=False, rounds=3, nodes=NODES[:3],
        projected={"learning_rate": 1e-3, "within_basis": False},
    )  # fmt: skip
    run(whole.model_copy(update={"rounds": 2}), tmp_path / "run")
    shutil.rmtree(tmp_path / "cache" / "residuals")
    told: list[Event] = []
    simulate(whole, tmp_path / "run", told.append, samples=0, resume=True)
    warned = [
        event.text for event in told if isinstance(event, Notice) and event.level == "warning"
    ]
    assert sorted(text.split()[2] for text in warned) == ["office", "school"]
    ledger = Ledger(tmp_path / "run")
    rounds = list(ledger.entries("round"))
    for entry, name in zip(rounds, ("", rounds[0].previous, ""), strict=True):
        rows = {n["node"]: n["report"]["residual"] for n in entry.content["nodes"]}
        assert rows == {"clinic": "", "school": name, "office": name}
    assert all(one.equal for one in replay(ledger, whole))
    ledger.close()


def test_a_mixed_model_is_exported_whole(
    configuration: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run(configuration(), tmp_path / "run")
    _, view = final_change(tmp_path / "run")
    export_merged(tmp_path / "run", tmp_path / "merged", tiny_model_folder)
    base = load_file(tiny_model_folder / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in base.items():
        assert torch.equal(merged[name], view.moved(name, weight))
        assert not torch.equal(merged[name], weight)
    assert not (tmp_path / "run" / "adapter").exists()


def test_nodes_choose_by_their_limits_and_a_resumed_run_chooses_the_same(
    configuration: Any, tmp_path: Path
) -> None:
    nodes = (
        {"name": "server", "strand": "auto"},
        {"name": "modem", "strand": "auto", "upload_limit_kb": 12},
        {"name": "phone", "strand": "auto", "backpropagates": False, "base_format": "nf4"},
        {"name": "laptop", "strand": "projected"},
    )
    whole = configuration(rounds=2, nodes=nodes, evaluate=False)
    run(whole, tmp_path / "whole")
    run(whole.model_copy(update={"rounds": 1}), tmp_path / "parts")
    run(whole, tmp_path / "parts", resume=True)
    assert ledger_head(tmp_path / "parts") == ledger_head(tmp_path / "whole")
    ledger = Ledger(tmp_path / "whole")
    rows = {n["node"]: n for n in list(ledger.entries("round"))[-1].content["nodes"]}
    chosen = {name: (n["family"], n["base_format"]) for name, n in rows.items()}
    assert chosen == {
        "server": ("low_rank", "full"), "modem": ("low_rank", "full"),
        "phone": ("seed_scalars", "nf4"), "laptop": ("sketch", "full"),
    }  # fmt: skip
    ranks = [rows[name]["plan"]["method"]["rank"] for name in ("server", "modem")]
    assert ranks[1] < ranks[0]
    assert rows["modem"]["bytes_up"] <= 12_000
    assert [bool(rows[name]["choice"]) for name in ("server", "laptop")] == [True, False]
    # Replay needs no choice: the genesis entry has what was chosen.
    assert all(one.equal for one in replay(ledger, recorded_configuration(ledger)))
    ledger.close()
    other = whole.nodes[1].model_copy(update={"link_mbps": 1e-6})
    limits = whole.model_copy(
        update={"rounds": 3, "nodes": (whole.nodes[0], other, *whole.nodes[2:])}
    )
    with pytest.raises((LedgerError, ConfigurationError)):
        run(limits, tmp_path / "whole", resume=True)


@pytest.mark.parametrize("node", ["cafe", "school", "phone"])
def test_a_node_alone_in_its_process_answers_as_one_of_many(
    node: str, configuration: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone it trains the rebuilt weights themselves, and has to make them again for the next plan."""
    asked = configuration(nodes=FORMATS)
    run(asked.model_copy(update={"rounds": 1}), tmp_path / "run")
    ledger = Ledger(tmp_path / "run")
    layout = read_layout(ledger)
    ((_, model),) = states(ledger, asked)
    content = next(iter(ledger.entries("genesis"))).content
    ledger.close()
    device = Capabilities(
        node=node, examples=1, held_out=1, rank_limit=64, base_digest=content["base_digest"],
        layout_json=layout.to_json(), threads=1, memory_bytes=1, device="cpu", versions={},
    )  # fmt: skip
    plan = make_plan(
        asked, device, round_number=2, layout=layout, base_digest=content["base_digest"]
    )
    view = model.common_view(PRESETS["mixed"], asked.view_rank, None)
    payload = encode_plan(plan, replace(view, basis=model.basis), asked.view_dtype)
    answers = []
    for others in (set(), {"another"}, set(), set()):
        monkeypatch.setattr(state, "_seen", set(others))
        answers.append(Worker().work(payload, NodeSettings(index=2)))
    assert answers[1:] == answers[:1] * 3


def test_what_a_node_measured_stands_beside_the_ledger(configuration: Any, tmp_path: Path) -> None:
    run(configuration(rounds=1, nodes=FORMATS), tmp_path / "run")
    ledger = Ledger(tmp_path / "run")
    (entry,) = ledger.entries("round")
    assert set(entry.wall["memory"]) == {node["name"] for node in FORMATS}
    for told in entry.wall["memory"].values():
        assert 0 <= told["grown"] <= told["resident"]
        assert told["resident"] > 0
    assert all(node["memory_bytes"] > 0 for node in entry.content["nodes"])
    ledger.close()
