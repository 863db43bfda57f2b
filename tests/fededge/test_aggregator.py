"""Edges between a real server and devices that say what a test wants: no model, no training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from aggregators import Layout, ProjectedGradient, SeedScalars
from aggregators.codec import pack, unpack
from aggregators.keys import load_or_create, public_hex
from aggregators.messages import Plan, Report, decode_plan, encode_reply
from aggregators.methods import ProjectedMethod, ZerothOrderMethod
from aggregators.signatures import sign_reply
from fedclient.app import make_app
from fedclient.node import Kind, NodeSettings
from fededge import aggregator
from fedserver import events
from fedserver.configuration import RunConfiguration, parse
from fedserver.exchange import Exchange
from fedserver.ledger import Ledger
from fedserver.rounds import Coordinator
from simulations.edges import edge_node
from simulations.local_grid import Answer, Delivery, LocalGrid, SimulatedClock, honest

PREFIX = "model.layers.0.self_attn"
LAYOUT = Layout({f"{PREFIX}.q_proj.weight": (8, 6), f"{PREFIX}.v_proj.weight": (8, 6)})
EVALUATION = {"loss_sum": 4.0, "tokens": 4, "correct": 1, "examples": 1}


class Device:
    """Answers every plan of a pool of seeds; ``told`` and ``has`` replace what an honest one says."""

    def __init__(self, name: str, **told: Any) -> None:
        self.name = name
        self.has: dict[str, Any] = {}
        self.told: dict[str, Any] = told
        self.plans: list[Plan] = []

    def answer(self, kind: Kind, payload: bytes, settings: NodeSettings) -> bytes:
        key = load_or_create(Path(settings.key)) if settings.key else None
        if kind == "query":
            honest_one: dict[str, Any] = {
                "node": self.name, "examples": 8, "held_out": 2, "rank_limit": 8,
                "base_digest": "b" * 64, "layout_json": LAYOUT.to_json(), "threads": 1,
                "memory_bytes": 0, "device": "cpu", "versions": {},
                "public_key": public_hex(key) if key else None,
            }  # fmt: skip
            return json.dumps(honest_one | self.has).encode()
        plan, sealed = decode_plan(payload)
        self.plans.append(plan)
        view = sealed.read(LAYOUT).digest()
        trains = plan.action == "train"
        report = {"examples": 8, "view": view, "evaluation": EVALUATION} | self.told
        reply = encode_reply(
            run=plan.run, round=plan.round, node=plan.node, nonce=plan.nonce, layout=plan.layout,
            base_digest=plan.base_digest, report=Report.model_validate(report),
            update=change(plan) if trains else None, dtype=None,
        )  # fmt: skip
        return sign_reply(reply, key) if key else reply


def change(plan: Plan) -> SeedScalars | ProjectedGradient:
    method = plan.method
    if isinstance(method, ProjectedMethod):
        numbers = {name: torch.full((k,), 1e-3) for name, k in method.coordinates.items()}
        return ProjectedGradient(LAYOUT, method.master_seed, numbers, method.probe)
    assert isinstance(method, ZerothOrderMethod)
    place = plan.seed % method.pool_size
    return SeedScalars(LAYOUT, method.master_seed, method.pool_size, [place], [1e-3], method.probe)


class Fleet:
    """A run of a server, edges and devices. ``keyless``: the devices that have no key."""

    def __init__(self, folder: Path, edges: Mapping[str, list[Device]], **changes: Any) -> None:
        self.folder = folder
        self.edges = edges
        names = [device.name for some in edges.values() for device in some]
        scenario: dict[str, Any] = {
            "preset": "fedkseed",
            "rounds": 1,
            "quorum": 1,
            "lora_r": 4,
            "evaluate": False,
            "nodes": [{"name": name} for name in names],
            "edges": [
                {"name": edge, "nodes": [one.name for one in some]} for edge, some in edges.items()
            ],
        }
        self.configuration: RunConfiguration = parse(scenario | changes)
        self.keyless: set[str] = set()
        self.restarted_in = 0
        self.notices: list[str] = []

    def listen(self, event: events.Event) -> None:
        if isinstance(event, events.Notice):
            self.notices.append(event.text)

    def restarted(self, make: Callable[[], Answer]) -> Answer:
        """An edge whose process is another one from a round on, under the same id of Flower's."""
        edges = [make()]

        def answer(message: Message, context: Context) -> list[Delivery]:
            if message.metadata.group_id == str(self.restarted_in) and len(edges) == 1:
                edges.append(make())
            return edges[-1](message, context)

        return answer

    def run(self, **arguments: Any) -> list[dict[str, Any]]:
        """The content of the rounds' entries."""
        answers, keys = {}, {}
        signs = self.configuration.signatures == "required"
        for place, (edge, devices) in enumerate(self.edges.items()):
            behind = {n: honest(make_app(one.answer)) for n, one in enumerate(devices)}
            own = {
                n: self.folder / "keys" / f"{one.name}.pem"
                for n, one in enumerate(devices)
                if signs and one.name not in self.keyless
            }
            make = partial(edge_node, edge, behind, own, lambda node, message: None, self.listen)
            answers[place] = self.restarted(make) if self.restarted_in else make()
            if signs:
                keys[place] = self.folder / "keys" / f"{edge}.pem"
        clock = SimulatedClock()
        exchange = Exchange(LocalGrid(answers, clock, keys=keys), clock)
        run = self.folder / "run"
        run.mkdir(parents=True, exist_ok=True)
        Coordinator(self.configuration, exchange, run, emit=self.listen, **arguments).run()
        ledger = Ledger(run)
        try:
            return [entry.content for entry in ledger.entries("round")]
        finally:
            ledger.close()


def verdicts(content: dict[str, Any]) -> dict[str, str]:
    """By node, of those behind edges too."""
    return {
        one["node"]: one["verdict"] for row in content["nodes"] for one in row.get("members", [row])
    }


@pytest.mark.parametrize("named", ["train_tokens", "steps"])
def test_the_largest_counts_of_two_devices_add(tmp_path: Path, named: str) -> None:
    devices = [Device("one", **{named: 10**12}), Device("two", **{named: 3})]
    (content,) = Fleet(tmp_path, {"edge": devices}).run()
    assert verdicts(content) == {"one": "accepted", "two": "accepted"}
    assert content["nodes"][0]["report"][named] == 10**12 + 3


def test_the_largest_evaluations_of_two_devices_add(tmp_path: Path) -> None:
    largest = {"loss_sum": 1e15, "tokens": 10**12, "correct": 10**12, "examples": 10**12}
    devices = [Device("one", evaluation=largest), Device("two")]
    (content,) = Fleet(tmp_path, {"edge": devices}).run()
    assert verdicts(content) == {"one": "accepted", "two": "accepted"}
    assert content["entering"]["tokens"] == 10**12 + 4


@pytest.mark.parametrize(
    "told",
    [
        {"train_tokens": 10**12 + 1},
        {"examples": 10**7 + 1},
        {"evaluation": EVALUATION | {"tokens": 10**12 + 1}},
        {"evaluation": EVALUATION | {"tokens": 10**12, "loss_sum": 1.1e15}},
    ],
)
def test_numbers_beyond_one_node_cost_nobody_else(tmp_path: Path, told: dict[str, Any]) -> None:
    (content,) = Fleet(tmp_path, {"edge": [Device("one", **told), Device("two")]}).run()
    assert verdicts(content) == {"one": "weight", "two": "accepted"}


def test_a_fleet_of_more_examples_than_one_node_may_claim(tmp_path: Path) -> None:
    devices = [Device("one", examples=9 * 10**6), Device("two", examples=9 * 10**6)]
    for device in devices:
        device.has = {"examples": 9 * 10**6, "held_out": 10**12}
    (content,) = Fleet(tmp_path, {"edge": devices}).run()
    assert verdicts(content) == {"one": "accepted", "two": "accepted"}
    assert content["nodes"][0]["report"]["examples"] == 18 * 10**6


@pytest.mark.parametrize(
    "has",
    [
        {"held_out": 10**12 + 1},
        {"devices": [{"node": "x", "examples": 1, "held_out": 0, "rank_limit": 1}]},
    ],
)
def test_an_odd_device_is_left_out_of_an_edge(tmp_path: Path, has: dict[str, Any]) -> None:
    devices = [Device("one"), Device("two")]
    devices[0].has = has
    (content,) = Fleet(tmp_path, {"edge": devices}).run()
    assert verdicts(content) == {"two": "accepted"}


def test_a_reason_of_many_escapes_costs_nobody_else(tmp_path: Path) -> None:
    class Odd(Device):
        def answer(self, kind: Kind, payload: bytes, settings: NodeSettings) -> bytes:
            if kind == "query":
                return super().answer(kind, payload, settings)
            header, tensors = unpack(super().answer(kind, payload, settings))
            header["envelope"]["\x1b" * 400] = 1
            return pack(header, tensors)

    (content,) = Fleet(tmp_path, {"edge": [Odd("one"), Device("two")]}).run()
    assert verdicts(content) == {"one": "malformed", "two": "accepted"}


@pytest.mark.parametrize("limit", ["max_examples", "max_update_bytes"])
def test_a_scenario_s_limits_are_of_devices(tmp_path: Path, limit: str) -> None:
    """Of each one behind an edge, and not of their sum."""
    count = 12
    devices = [Device(f"n{n:02}") for n in range(count)]
    value = 8 if limit == "max_examples" else 1300
    if limit == "max_examples":
        devices[0].told = {"examples": 9}
    else:
        devices[0].told = {"residual": "", "train_loss": 1.0}
        devices[0].answer = padded(devices[0])  # type: ignore[method-assign]
    (content,) = Fleet(tmp_path, {"edge": devices}, **{limit: value}).run()
    found = verdicts(content)
    refused = "weight" if limit == "max_examples" else "too_large"
    assert found.pop("n00") == refused
    assert set(found.values()) == {"accepted"}
    assert len(found) == count - 1


def padded(device: Device) -> Any:
    honest_one = device.answer

    def answer(kind: Kind, payload: bytes, settings: NodeSettings) -> bytes:
        reply = honest_one(kind, payload, settings)
        return reply if kind == "query" else reply + b"\0" * 1300

    return answer


def test_a_device_without_a_key_is_left_out_where_signatures_are_required(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, {"edge": [Device("one"), Device("two")]}, signatures="required")
    fleet.keyless = {"one"}
    (content,) = fleet.run()
    assert verdicts(content) == {"two": "accepted"}
    assert any("'one' has no key" in notice for notice in fleet.notices)


def test_a_device_that_is_not_enrolled_is_left_out(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, {"edge": [Device("one"), Device("two")]}, signatures="required")
    keys = {name: load_or_create(tmp_path / "keys" / f"{name}.pem") for name in ("edge", "two")}
    (content,) = fleet.run(enrolled={name: public_hex(key) for name, key in keys.items()})
    assert verdicts(content) == {"two": "accepted"}
    assert any("'one' is not enrolled" in notice for notice in fleet.notices)


def test_a_device_keeps_the_key_that_it_signed_with(tmp_path: Path) -> None:
    edges = {"edge": [Device("one"), Device("two")]}
    Fleet(tmp_path, edges, signatures="required").run()
    (tmp_path / "keys" / "one.pem").unlink()
    fleet = Fleet(tmp_path, edges, signatures="required", rounds=2)
    _, content = fleet.run(resume=True)
    assert verdicts(content) == {"two": "accepted"}
    assert any("enrol it again" in notice for notice in fleet.notices)


@pytest.mark.parametrize(("key", "verdict"), [("", "unsigned"), ("a" * 64, "foreign_key")])
def test_a_sum_of_what_a_device_has_not_signed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, verdict: str
) -> None:
    """Of an edge that admits what it should not."""
    row = aggregator._row
    monkeypatch.setattr(aggregator, "_row", lambda o: row(o).model_copy(update={"key": key}))
    (content,) = Fleet(tmp_path, {"edge": [Device("one")]}, signatures="required").run()
    assert verdicts(content) == {"edge": verdict}


def test_a_device_s_history_is_its_own(tmp_path: Path) -> None:
    """It names the rounds that asked the device, not those that asked its edge."""
    edges = {
        "hall": [Device(name) for name in ("one", "two", "three")],
        "yard": [Device(name) for name in ("four", "five", "six")],
    }
    Fleet(
        tmp_path, edges, preset="ferret", rounds=6, participation=0.5, projected={"coordinates": 4}
    ).run()
    asked = [len(device.plans) for devices in edges.values() for device in devices]
    assert sum(asked) == 18
    assert len(set(asked)) > 1
    for devices in edges.values():
        for device in devices:
            names = [plan.history[0] for plan in device.plans]
            for number, plan in enumerate(device.plans):
                assert plan.history == tuple(names[number::-1])


def test_unlike_weights_are_told_across_edges(tmp_path: Path) -> None:
    """Each edge alone sees nothing odd."""
    edges = {
        "hall": [Device("one", weights="a" * 64), Device("two", weights="a" * 64)],
        "yard": [Device("three", weights="b" * 64)],
    }
    fleet = Fleet(tmp_path, edges)
    (content,) = fleet.run()
    assert set(verdicts(content).values()) == {"accepted"}
    told = [notice for notice in fleet.notices if "weights" in notice]
    assert len(told) == 1
    assert "three's weights bbbbbbbbbbbb are not the aaaaaaaaaaaa that 2 nodes made" in told[0]


def test_an_edge_that_was_started_again_learns_who_its_devices_are(tmp_path: Path) -> None:
    edges = {"hall": [Device("one"), Device("two")], "yard": [Device("three")]}
    fleet = Fleet(tmp_path, edges, rounds=3)
    fleet.restarted_in = 2
    for content in fleet.run():
        assert verdicts(content) == dict.fromkeys(("one", "two", "three"), "accepted")
    assert [len(device.plans) for some in edges.values() for device in some] == [3, 3, 3]
