"""Operators' actions on real runs: applied between rounds, recorded, replayed, kept on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedserver import events, metrics
from fedserver.configuration import RunConfiguration, load
from fedserver.control import OPERATOR, ControlQueue
from fedserver.dashboard import node_views, round_views
from fedserver.dashboard.application import live_payload
from fedserver.dashboard.exposition import Exposition
from fedserver.dashboard.library import Library
from fedserver.dashboard.page import Question
from fedserver.dashboard.run_files import read_json
from fedserver.dashboard.run_reader import RunReader
from fedserver.dashboard.standings import standings
from fedserver.ledger import Entry, Ledger
from fedserver.live_log import LIVE, state_of
from fedserver.replay import replay, restore
from simulations.engines import run_local


@pytest.fixture
def configuration(tiny_scenario: Path) -> RunConfiguration:
    return load(str(tiny_scenario), ["rounds=4", "local_steps=1", "quorum=1"])


def run(
    configuration: RunConfiguration,
    folder: Path,
    asked: dict[int, list[tuple[str, dict[str, Any]]]] | None = None,
    *,
    resume: bool = False,
    emit: events.Listener = lambda event: None,
) -> None:
    """Run, asking what stands under a round's number when that round has been committed."""

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundCommitted):
            ask(folder, *(asked or {}).get(event.round, []))
        emit(event)

    run_local(configuration, folder, listen, resume=resume)


class Killed(Exception):
    """The end of a process, as far as a run can tell."""


def dying(number: int) -> events.Listener:
    """A listener in which the run dies at the beginning of a round."""

    def listen(event: events.Event) -> None:
        if event == events.RoundStarted(number):
            raise Killed

    return listen


def ask(folder: Path, *wanted: tuple[str, dict[str, Any]]) -> None:
    for action, arguments in wanted:
        ControlQueue(folder).ask(action, arguments, who="eve", role="operator", reason="a test")


def entries(folder: Path, kind: str) -> list[Entry]:
    ledger = Ledger(folder)
    found = list(ledger.entries(kind))
    ledger.close()
    return found


def head(folder: Path) -> str:
    ledger = Ledger(folder)
    try:
        return ledger.head
    finally:
        ledger.close()


def participants(entry: Entry) -> set[str]:
    return {node["node"] for node in entry.content["nodes"]}


def test_what_is_asked_holds_from_the_next_round_and_is_in_the_ledger(
    configuration: RunConfiguration, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    wanted = {
        1: [("next_round", {"deadline_seconds": 7.5}), ("drain", {"node": "weak"})],
        2: [
            ("readmit", {"node": "weak"}),
            ("revoke", {"node": "strong"}),
            ("pause", {}),
            ("resume", {}),
        ],
        3: [(action, {"node": "strong"}) for action in ("readmit", "drain", "quarantine", "revoke")],
    }  # fmt: skip
    run(configuration, folder, wanted)
    rounds = entries(folder, "round")
    assert [participants(entry) for entry in rounds] == [
        {"strong", "weak"}, {"strong"}, {"weak"}, {"weak"},
    ]  # fmt: skip
    deadlines = [{node["plan"]["deadline_seconds"] for node in e.content["nodes"]} for e in rounds]
    assert deadlines == [{60.0}, {7.5}, {60.0}, {60.0}]
    recorded = [(e.round, e.content["action"], e.content["who"]) for e in entries(folder, OPERATOR)]
    assert recorded == [
        (2, "next_round", "eve"), (2, "drain", "eve"), (3, "readmit", "eve"), (3, "revoke", "eve"),
        (3, "pause", "eve"), (3, "resume", "eve"),
    ]  # fmt: skip
    refused = [r.action for r in ControlQueue(folder).requests() if r.state == "refused"]
    # A revoked node does not come back, by no way round.
    assert refused == ["revoke", "quarantine", "drain", "readmit"]
    assert standings(RunReader(folder, "run")) == {"strong": "revoked"}
    ledger = Ledger(folder)
    assert ledger.verify() == []
    assert all(one.equal for one in replay(ledger, configuration))
    ledger.close()


def test_a_roll_back_brings_the_model_back_and_replays(
    configuration: RunConfiguration, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    told: list[events.EvaluationDone] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.EvaluationDone):
            told.append(event)

    run(configuration, folder, {3: [("rollback", {"round": 1})]}, emit=listen)
    ledger = Ledger(folder)
    rounds = list(ledger.entries("round"))
    (rolled,) = ledger.entries(OPERATOR)
    assert rolled.content["state"] == rounds[0].content["state"]
    # The nodes of round 4 received, and evaluated, the model of round 1.
    assert rounds[3].content["entering"] == rounds[1].content["entering"]
    assert [event.round for event in told] == [0, 1, 2, 1, 4]
    scores = metrics.evaluations(ledger)
    assert 3 not in scores
    again = metrics.scores(rounds[1].content["entering"])
    assert again is not None
    assert again.items() <= (scores[1] or {}).items()
    found = replay(ledger, configuration)
    assert [one.rolled_back_to for one in found] == [None, None, None, 1, None]
    assert all(one.equal for one in found)
    model, _ = restore(ledger, configuration)
    ledger.close()
    # A process that dies directly after the roll-back, whose state is then lost.
    lost = tmp_path / "lost"
    with pytest.raises(Killed):
        run(configuration, lost, {3: [("rollback", {"round": 1})]}, emit=dying(4))
    ledger = Ledger(lost, write=True)
    assert ledger.last(OPERATOR).content["state"] == rolled.content["state"]
    ledger.forget(rolled.content["state"])
    assert restore(ledger, configuration)[0].digest() == rolled.content["state"]
    ledger.close()
    run(configuration, lost, resume=True)
    ledger = Ledger(lost)
    assert restore(ledger, configuration)[0].digest() == model.digest()
    ledger.close()


def test_a_stopped_run_goes_on_where_it_was_asked_to(
    configuration: RunConfiguration, tmp_path: Path
) -> None:
    """Who was put out stays out; without actions the head is that of a run that nobody watched."""
    folder = tmp_path / "run"
    run(configuration, folder, {1: [("quarantine", {"node": "strong"})], 2: [("stop", {})]})
    assert len(entries(folder, "round")) == 2
    assert state_of(read_json(folder / LIVE)) == "stopped"
    assert not entries(folder, "evaluation")
    run(configuration, folder, resume=True)
    assert [participants(entry) for entry in entries(folder, "round")] == [
        {"strong", "weak"}, {"weak"}, {"weak"}, {"weak"},
    ]  # fmt: skip
    assert len(entries(folder, "evaluation")) == 1
    run(configuration, tmp_path / "one")
    with pytest.raises(Killed):
        run(configuration, tmp_path / "two", emit=dying(3))
    run(configuration, tmp_path / "two", resume=True)
    assert head(tmp_path / "one") == head(tmp_path / "two")


def test_a_paused_run_waits_and_is_still_paused_when_resumed(
    configuration: RunConfiguration, tmp_path: Path
) -> None:
    """A process that dies while it is paused leaves a pause, and a request is applied once only."""
    folder = tmp_path / "run"

    def die(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and event.phase == "paused":
            raise Killed

    with pytest.raises(Killed):
        run(configuration, folder, {2: [("pause", {})]}, emit=die)
    # As if it had died between the ledger and the queue.
    queue = ControlQueue(folder)
    (request,) = queue.requests()
    queue.settle(request, "pending")
    waited: list[int] = []

    def resume(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and event.phase == "paused":
            waited.append(event.round)
            ask(folder, ("resume", {}))

    run(configuration, folder, resume=True, emit=resume)
    assert waited == [3]
    assert [e.content["action"] for e in entries(folder, OPERATOR)] == ["pause", "resume"]
    assert [r.state for r in queue.requests()] == ["applied", "applied"]
    assert len(entries(folder, "round")) == 4


def test_an_export_stands_in_the_ledger_of_a_run_under_way_with_its_outcome_alone(
    configuration: RunConfiguration, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    queue = ControlQueue(folder)

    def export(event: events.Event) -> None:
        if isinstance(event, events.RoundCommitted) and event.round == 1:
            ask(folder, *[("export", {"kind": "peft", "to": f"exports/{n}"}) for n in range(3)])
        if isinstance(event, events.RoundCommitted) and event.round == 2:
            assert {request.state for request in queue.requests()} == {"requested"}
            queue.say(queue.requests()[1], "failed", "no space")
            assert not entries(folder, OPERATOR)
        if isinstance(event, events.RoundCommitted) and event.round == 4:
            queue.say(queue.requests()[0], "done", "exports/2")

    run(configuration, folder, emit=export)
    recorded = [
        (e.round, e.content["outcome"], e.content["note"]) for e in entries(folder, OPERATOR)
    ]
    assert recorded == [(3, "failed", "no space"), (4, "done", "exports/2")]
    # Of the third nobody knows yet.
    assert [request.state for request in queue.requests()] == ["done", "failed", "requested"]
    assert not queue.outcomes()


def test_who_is_kept_out_does_not_wait_and_is_remembered(
    configuration: RunConfiguration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedserver.dashboard.run_reader.ROUNDS_OF_NODES", 1)
    folder = tmp_path / "run"
    counted: list[dict[str, int]] = []
    scraped: list[str] = []

    def listen(event: events.Event) -> None:
        if event == events.RoundStarted(4):
            counted.append(round_views.live(RunReader(folder, "run"), Question()).data["arrivals"])
            scraped.append(Exposition(Library(tmp_path)).text(0).decode())

    run(configuration, folder, {1: [("drain", {"node": "weak"})]}, emit=listen)
    assert counted == [{"waiting": 1, "drained": 1}]
    assert 'fedbraid_run_nodes{run="run",status="drained"} 1.0' in scraped[0]
    rows = node_views.fleet(RunReader(folder, "run"), Question()).tables["fleet"].rows
    found = {row["node"]: row for row in rows}
    assert (found["weak"]["status"], found["weak"]["last_round"]) == ("drained", 1)
    assert found["weak"]["last_seen"] == entries(folder, "round")[0].wall["started"]
    assert found["strong"]["last_round"] == 4


@pytest.mark.parametrize("action", ["drain", "quarantine", "revoke"])
def test_a_run_without_a_node_to_train_is_held_until_one_is_readmitted_or_it_is_stopped(
    configuration: RunConfiguration, tmp_path: Path, action: str
) -> None:
    folder = tmp_path / "run"
    held: list[dict[str, Any]] = []
    then: dict[str, tuple[str, dict[str, Any]]] = {
        "drain": ("readmit", {"node": "weak"}),
        "quarantine": ("readmit", {"node": "weak"}),
        "revoke": ("stop", {}),
    }

    def act(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and event.phase == "held":
            held.append(read_json(folder / LIVE))
            ask(folder, then[action])

    run(configuration, folder, {1: [(action, {"node": n}) for n in ("strong", "weak")]}, emit=act)
    (told,) = held
    assert state_of(told) == "held"
    assert "readmit" in told["reason"]
    assert "stop" in told["reason"]
    rounds = entries(folder, "round")
    live = read_json(folder / LIVE)
    if action == "revoke":
        assert (len(rounds), state_of(live)) == (1, "stopped")
        return
    assert [participants(entry) for entry in rounds[1:]] == [{"weak"}] * 3
    assert all(entry.content["quorum"] for entry in rounds)
    assert (state_of(live), live["reason"]) == ("finished", "")


def test_a_run_waits_while_its_quorum_is_out_of_reach(
    configuration: RunConfiguration, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    both = configuration.model_copy(update={"quorum": 2})
    reasons: list[str] = []
    then = [("next_round", {"quorum": 1}), ("readmit", {"node": "weak"})]

    def act(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and event.phase == "held":
            reasons.append(event.reason)
            ask(folder, then.pop(0))

    run(both, folder, {1: [("drain", {"node": "weak"})] * 2}, emit=act)
    assert len(reasons) == 2
    assert all("1 node may train and a round needs 2 updates" in reason for reason in reasons)
    rounds = entries(folder, "round")
    assert [len(participants(entry)) for entry in rounds] == [2, 1, 2, 2]
    assert all(entry.content["quorum"] for entry in rounds)
    # The second drain had nothing to do.
    assert [request.state for request in ControlQueue(folder).requests()].count("refused") == 1


def test_a_paused_run_says_that_it_has_no_node_as_long_as_it_has_none(
    configuration: RunConfiguration, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    told: list[tuple[str, bool]] = []

    def act(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and event.phase in ("paused", "held"):
            told.append((event.phase, bool(read_json(folder / LIVE)["reason"])))
            ask(folder, ("readmit", {"node": "weak"}) if event.reason else ("resume", {}))

    out = [("drain", {"node": node}) for node in ("strong", "weak")]
    run(configuration, folder, {3: [*out, ("pause", {})]}, emit=act)
    assert told == [("paused", True), ("paused", False)]
    assert participants(entries(folder, "round")[-1]) == {"weak"}


def test_a_run_whose_last_rounds_missed_their_quorum_is_no_success(
    configuration: RunConfiguration, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    told: list[bool] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundCommitted):
            told.append(event.quorum)

    nodes = [
        node.model_copy(update={"away": (3, 4)}) if node.name == "strong" else node
        for node in configuration.nodes
    ]
    few = configuration.model_copy(update={"nodes": tuple(nodes)})
    run(few, folder, {2: [("drain", {"node": "weak"})]}, emit=listen)
    live, summary = read_json(folder / LIVE), read_json(folder / "summary.json")
    assert told == [True, True, False, False]
    assert summary["rounds_without_quorum"] == [3, 4]
    assert state_of(live) == "no_quorum"
    assert "rounds 3 to 4" in live["reason"]
    assert "rounds 3 to 4" in str(metrics.nothing_learnt(summary, folder))
    log = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in log if "phase" in line} >= {"train", "evaluate"}
    assert max(line.get("round", 0) for line in log) == 4
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["quorum"] for line in lines] == told
    page = round_views.rounds(RunReader(folder, "run"), Question())
    assert [row["quorum"] for row in page.tables["rounds"].rows] == [
        "missed",
        "missed",
        "met",
        "met",
    ]
    payload = live_payload(RunReader(folder, "run"))
    # "weak" was asked twice and "strong" four times: six exchanges, not eight.
    a_node = live["model_bytes_a_node"]
    assert (
        summary["bytes_full_model"] == 6 * a_node == payload["data"]["totals"]["bytes_full_model"]
    )
    ranks = sum(
        (node.lora_r or configuration.lora_r) * (2 if node.name == "weak" else 4)
        for node in configuration.nodes
    )
    assert summary["bytes_full_lora"] == ranks * live["lora_bytes_a_rank"]
    assert payload["data"]["totals"]["bytes_full_lora"] == summary["bytes_full_lora"]
    assert payload["data"]["without_quorum"] == [3, 4]
    assert "rounds 3 to 4" in payload["fragments"]["standing"]


def test_requests_that_make_no_sense_are_refused_with_the_reason(
    configuration: RunConfiguration, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("resume", {}),
        ("drain", {"node": "nobody"}),
        ("rollback", {"round": 9}),
        ("rollback", {"round": 1}),
        ("readmit", {"node": "weak"}),
        ("next_round", {"quorum": 5}),
    ]
    run(configuration, folder, {1: wanted, 4: [("pause", {})]})
    assert {request.state for request in ControlQueue(folder).requests()} == {"refused"}
    assert not entries(folder, OPERATOR)
    run(configuration, tmp_path / "unasked")
    assert head(folder) == head(tmp_path / "unasked")
