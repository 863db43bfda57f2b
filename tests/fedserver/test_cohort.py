"""Who takes part in a run: the scenario's nodes, each with its own data, and none that was shut out."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from aggregators import Layout
from aggregators.messages import Evaluation, Plan, Report, decode_plan, encode_reply
from aggregators.methods import ZerothOrderMethod
from aggregators.seed_scalars import SeedScalars
from fedclient.app import make_app
from fedclient.node import Kind, NodeSettings
from fedserver import events
from fedserver.configuration import ConfigurationError, RunConfiguration, parse
from fedserver.control import ControlQueue
from fedserver.exchange import Exchange
from fedserver.ledger import Ledger
from fedserver.roster import CONNECT_SECONDS
from fedserver.rounds import Coordinator
from simulations.local_grid import FIRST_NODE, Answer, Delivery, LocalGrid, SimulatedClock, honest
from simulations.run import ledger_head

LAYOUT = Layout({"model.layers.0.self_attn.q_proj.weight": (16, 8)})


class Device:
    """Answers without a model. ``silent_in``: a round whose plan it never answers, or 0 for the query.
    ``until``: when, in seconds, it goes away.
    """

    def __init__(
        self, name: str, silent_in: int | None = None, until: float = math.inf, **has: Any
    ) -> None:
        self.name, self.silent_in, self.until, self.has = name, silent_in, until, has
        self.plans: list[Plan] = []

    def node(self) -> Answer:
        answer = honest(make_app(self.answer))

        def deliver(message: Message, context: Context) -> list[Delivery]:
            found = answer(message, context)
            return [] if message.metadata.group_id == str(self.silent_in) else found

        return deliver

    def answer(self, kind: Kind, payload: bytes, settings: NodeSettings) -> bytes:
        if kind == "query":
            return json.dumps(
                {
                    "node": self.name, "examples": 8, "held_out": 2, "rank_limit": 8,
                    "base_digest": "b" * 64, "layout_json": LAYOUT.to_json(), "threads": 1,
                    "memory_bytes": 0, "device": "cpu", "versions": {},
                } | self.has
            ).encode()  # fmt: skip
        plan, sealed = decode_plan(payload)
        self.plans.append(plan)
        method = plan.method
        assert isinstance(method, ZerothOrderMethod)
        place = plan.seed % method.pool_size
        scores = Evaluation(loss_sum=2.0, tokens=2, correct=1, examples=2)
        return encode_reply(
            run=plan.run, round=plan.round, node=plan.node, nonce=plan.nonce, layout=plan.layout,
            base_digest=plan.base_digest,
            report=Report(examples=8, view=sealed.read(LAYOUT).digest(), evaluation=scores),
            update=SeedScalars(
                LAYOUT, method.master_seed, method.pool_size, [place], [1e-3], method.probe
            ),
            dtype=None,
        )  # fmt: skip


class Connecting(LocalGrid):
    """A grid whose nodes connect one by one. ``at``: when, in seconds, each of them does."""

    def __init__(self, devices: list[Device], at: list[float], clock: SimulatedClock) -> None:
        super().__init__({n: one.node() for n, one in enumerate(devices)}, clock)
        self._stays = [(begin, one.until) for begin, one in zip(at, devices, strict=True)]
        self._time = clock

    def get_node_ids(self) -> Iterable[int]:
        now = self._time.now()
        return [FIRST_NODE + n for n, (begin, end) in enumerate(self._stays) if begin <= now < end]


class Run:
    """A run over such devices, and what was told of it."""

    def __init__(self, folder: Path, *names: str, **changes: Any) -> None:
        scenario: dict[str, Any] = {
            "preset": "fedkseed", "rounds": 1, "quorum": 1, "lora_r": 4, "evaluate": False,
            "deadline_seconds": 600.0, "nodes": [{"name": name} for name in names],
        }  # fmt: skip
        self.configuration: RunConfiguration = parse(scenario | changes)
        self.folder = folder / "run"
        self.clock = SimulatedClock()
        self.events: list[events.Event] = []
        self.hear: Callable[[events.Event], None] = lambda event: None

    def _listen(self, event: events.Event) -> None:
        self.events.append(event)
        self.hear(event)

    def over(self, *devices: Device, at: list[float] | None = None, **arguments: Any) -> list[Any]:
        """Each round's verdicts, by node."""
        grid = Connecting(list(devices), at or [0.0] * len(devices), self.clock)
        self.folder.mkdir(parents=True, exist_ok=True)
        exchange = Exchange(grid, self.clock)
        Coordinator(self.configuration, exchange, self.folder, emit=self._listen, **arguments).run()
        ledger = Ledger(self.folder)
        try:
            contents = [entry.content for entry in ledger.entries("round")]
        finally:
            ledger.close()
        return [{row["node"]: row["verdict"] for row in content["nodes"]} for content in contents]

    @property
    def notices(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, events.Notice)]


def test_who_is_not_in_the_scenario_takes_no_missing_nodes_place(tmp_path: Path) -> None:
    run = Run(tmp_path, "clinic", "phone")
    stranger = Device("tablet", part=0)
    assert run.over(Device("clinic", part=0), stranger, Device("phone"), at=[0, 0, 60]) == [
        {"clinic": "accepted", "phone": "accepted"}
    ]
    assert run.clock.now() < CONNECT_SECONDS
    assert any("'tablet' is not in the scenario" in text for text in run.notices)
    assert stranger.plans == []


def test_who_is_missing_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path, "clinic", "phone")
    assert run.over(Device("clinic"), Device("tablet")) == [{"clinic": "accepted"}]
    assert any(text.startswith("phone is missing") for text in run.notices)
    with pytest.raises(ConfigurationError, match="'tablet' is not in the scenario"):
        Run(tmp_path / "other", "clinic", "phone", quorum=2).over(
            Device("clinic"), Device("tablet")
        )


def test_a_newcomer_is_let_in_with_data_of_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path, "clinic", newcomers=True)
    devices = Device("clinic", part=0), Device("tablet"), Device("watch", part=1)
    assert run.over(*devices) == [{"clinic": "accepted", "tablet": "accepted"}]
    assert any("'watch' is not in the scenario" in text for text in run.notices)


def test_no_two_nodes_play_the_owner_of_the_same_data(tmp_path: Path) -> None:
    run = Run(tmp_path, "clinic", "phone", "ward")
    devices = Device("clinic", part=0), Device("phone", part=0), Device("ward", part=2)
    (verdicts,) = run.over(*devices)
    assert len(verdicts) == 2
    assert any("plays the owner of part 0" in text for text in run.notices)


def test_newcomers_decide_nothing_of_a_run(tmp_path: Path) -> None:
    strict, open_ = (
        Run(tmp_path, "a").configuration,
        Run(tmp_path, "a", newcomers=True).configuration,
    )
    assert strict.run_id() == open_.run_id()
    assert strict.identity() == open_.identity()


def revoking(run: Run, name: str, in_round: int) -> Callable[[], frozenset[str]]:
    """Who is revoked: that node, from the moment at which a round has sent its plans."""
    gone: set[str] = set()

    def hear(event: events.Event) -> None:
        if isinstance(event, events.PlansSent) and event.round == in_round:
            gone.add(name)

    run.hear = hear
    return lambda: frozenset(gone)


def test_a_revoked_node_is_not_waited_for(tmp_path: Path) -> None:
    run = Run(tmp_path, "a", "b", rounds=4, quorum=None)
    revoked = revoking(run, "b", 2)
    found = run.over(Device("a"), Device("b", silent_in=2), revoked=revoked)
    assert found == [
        {"a": "accepted", "b": "accepted"}, {"a": "accepted", "b": "revoked"},
        {"a": "accepted"}, {"a": "accepted"},
    ]  # fmt: skip
    assert run.clock.now() < run.configuration.deadline_seconds
    assert sum("'b' has been revoked" in text for text in run.notices) == 1
    # More than half of those that may still train: every round counts.
    ledger = Ledger(run.folder)
    assert [entry.content["quorum"] for entry in ledger.entries("round")] == [True] * 4
    ledger.close()


def test_a_quorum_that_a_revocation_puts_out_of_reach_ends_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, "a", "b", rounds=4, quorum=2)
    revoked = revoking(run, "b", 2)
    with pytest.raises(ConfigurationError, match=r"1 nodes may still train .* b was revoked"):
        run.over(Device("a"), Device("b", silent_in=2), revoked=revoked)
    assert run.clock.now() < run.configuration.deadline_seconds
    # Another device that has joined under its name takes its place.
    found = run.over(Device("a"), Device("b"), resume=True)
    assert found[2:] == [{"a": "accepted", "b": "accepted"}] * 2


def test_a_node_that_was_revoked_before_is_not_waited_for_either(tmp_path: Path) -> None:
    run = Run(tmp_path, "a", "b", quorum=None)
    assert run.over(Device("a"), revoked=lambda: frozenset({"b"})) == [{"a": "accepted"}]
    assert run.clock.now() < CONNECT_SECONDS
    assert any("b is missing: it has been revoked" in text for text in run.notices)


def test_a_node_that_is_revoked_while_nodes_are_awaited_is_awaited_no_longer(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, "a", "b", quorum=None)
    found = run.over(Device("a"), revoked=lambda: frozenset({"b"} if run.clock.now() >= 30 else ()))
    assert found == [{"a": "accepted"}]
    assert 30 <= run.clock.now() < 40
    assert any("b is missing: it has been revoked" in text for text in run.notices)


@pytest.mark.parametrize("newcomers", [False, True])
def test_a_node_that_is_revoked_while_it_loads_its_model_is_awaited_no_longer(
    newcomers: bool, tmp_path: Path
) -> None:
    run = Run(tmp_path, "a", "b", quorum=None, newcomers=newcomers)
    loading = Device("b", silent_in=0, until=90.0)
    found = run.over(
        Device("a"), loading, revoked=lambda: frozenset({"b"} if run.clock.now() >= 30 else ())
    )
    assert found == [{"a": "accepted"}]
    # Among newcomers nobody knows whose silence it is before it has gone.
    assert run.clock.now() < (100 if newcomers else 40)


def test_what_speaks_against_a_node_that_comes_during_the_query_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path, "a", "b", "c", quorum=1)
    run.over(
        Device("a", part=0), Device("b", silent_in=0), Device("c", part=0),
        at=[0.0, 0.0, CONNECT_SECONDS + 10],
    )  # fmt: skip
    assert sum("'c' plays the owner of part 0" in text for text in run.notices) == 1


def test_what_speaks_against_nodes_is_one_line_of_an_error(tmp_path: Path) -> None:
    devices = [Device(name, part=0) for name in ("a", "b", "c")]
    with pytest.raises(ConfigurationError) as error:
        Run(tmp_path, "a", "b", "c", quorum=3).over(*devices)
    assert "lower 'quorum': " in str(error.value)
    assert "; " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_that_is_stopped_at_once_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, stopped = Run(tmp_path / "whole", "a", "b", rounds=3), Run(tmp_path, "a", "b", rounds=3)
    whole.over(Device("a"), Device("b"))

    def hear(event: events.Event) -> None:
        if isinstance(event, events.PlansSent) and event.round == 2:
            ask = ControlQueue(stopped.folder).ask
            ask("stop", {"now": True}, who="ana", role="operator", reason="a test")

    stopped.hear = hear
    found = stopped.over(Device("a"), Device("b", silent_in=2))
    assert len(found) == 1
    assert stopped.events[-1] == events.RoundsEnded("stopped", "stopped by ana")
    assert stopped.clock.now() < stopped.configuration.deadline_seconds
    assert [one.state for one in ControlQueue(stopped.folder).requests()] == ["applied"]
    stopped.hear = lambda event: None
    stopped.over(Device("a"), Device("b"), resume=True)
    assert ledger_head(stopped.folder) == ledger_head(whole.folder)


@pytest.mark.parametrize("waits", ["held", "paused"])
def test_who_joins_while_a_run_waits_takes_part_when_it_goes_on(waits: str, tmp_path: Path) -> None:
    """Operators keep the only node out: the one that comes to take its place ends the hold."""
    run = Run(tmp_path, "clinic", "phone", rounds=3)
    queue = ControlQueue(run.folder)
    late = threading.Timer(60.0, lambda: ask("stop"))

    def ask(action: str, **arguments: str) -> None:
        queue.ask(action, arguments, who="olga", role="operator", reason="a test")

    def hear(event: events.Event) -> None:
        if event == events.RoundStarted(1):
            ask("drain", node="clinic")
            if waits == "paused":
                ask("pause")
        elif isinstance(event, events.PhaseStarted) and event.phase == waits:
            run.clock.wait(1000.0)
            late.start()
        elif waits == "paused" and "'phone' has joined" in getattr(event, "text", ""):
            ask("resume")

    run.hear = hear
    try:
        verdicts = run.over(Device("clinic"), Device("phone"), at=[0.0, 1000.0])
    finally:
        late.cancel()
    assert verdicts == [{"clinic": "accepted"}, {"phone": "accepted"}, {"phone": "accepted"}]
