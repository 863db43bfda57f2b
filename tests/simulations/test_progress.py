"""The state of a run follows its events in whatever order a run can bring them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedserver import events
from simulations.progress import Pace, RunProgress

Timed = list[tuple[float, events.Event]]
MakeEvents = Callable[..., Timed]


def play(told: Iterable[tuple[float, events.Event]]) -> RunProgress:
    progress = RunProgress()
    for now, event in told:
        progress.apply(event, now)
    return progress


@given(rounds=st.integers(1, 5), steps=st.integers(1, 7), pace=st.floats(0.01, 100))
def test_remaining_time_is_exact_at_a_constant_pace(
    fake_events: MakeEvents, rounds: int, steps: int, pace: float
) -> None:
    told = fake_events(rounds=rounds, steps=steps, seconds_per_step=pace, evaluate=False)
    end = told[-1][0]
    progress = RunProgress()
    for now, event in told:
        progress.apply(event, now)
        remaining = progress.remaining(now)
        if remaining is not None:
            assert remaining == pytest.approx(end - now, rel=1e-6, abs=1e-6 * end)
    assert progress.share() == pytest.approx(1.0)


@given(done=st.integers(1, 3), steps=st.integers(1, 7), pace=st.floats(0.01, 100))
def test_remaining_time_is_that_of_what_is_left_after_a_resumption(
    fake_events: MakeEvents, done: int, steps: int, pace: float
) -> None:
    def told(first_round: int) -> Timed:
        return fake_events(
            rounds=4, steps=steps, seconds_per_step=pace, evaluate=False, first_round=first_round
        )

    progress = RunProgress()
    for now, event in told(1):
        if isinstance(event, events.RoundStarted) and event.round > done:
            break
        progress.apply(event, now)
    resumed, idle = told(done + 1), 1000.0
    end = resumed[-1][0]
    for time, event in resumed:
        progress.apply(event, idle + time)
        remaining = progress.remaining(idle + time)
        if remaining is not None:
            assert remaining == pytest.approx(end - time, rel=1e-6, abs=1e-6 * (idle + end))
    assert progress.share() == pytest.approx(1.0)


@given(st.integers(0, 10**6))
def test_progress_never_goes_back(fake_events: MakeEvents, seed: int) -> None:
    dice = random.Random(seed)
    progress, share = RunProgress(), 0.0
    for now, event in fake_events(steps=dice.randint(1, 5), rounds=dice.randint(1, 4)):
        if isinstance(event, events.NodeProgress) and dice.random() < 0.3:
            continue  # A transport may lose progress; replies and commits still come.
        progress.apply(event, now)
        assert progress.share() >= share - 1e-9
        share = progress.share()
        assert progress.remaining(now) is None or progress.remaining(now) >= 0.0  # type: ignore[operator]
    assert share == pytest.approx(1.0)


def test_a_slow_stretch_is_forgotten() -> None:
    pace = Pace(horizon=10)
    pace.observe(100.0, 10)
    for step in range(1, 101):
        pace.observe(100.0 + step, 10 + step)
    assert pace.remaining(200.0, 120) == pytest.approx(10.0, rel=0.02)


def test_remaining_time_runs_down_between_events() -> None:
    pace = Pace(horizon=10)
    pace.observe(10.0, 10)
    assert pace.remaining(10.0, 20) == pytest.approx(10.0)
    assert pace.remaining(14.0, 20) == pytest.approx(6.0)
    assert pace.remaining(99.0, 20) == 0.0


def test_nothing_is_promised_before_anything_is_done(fake_events: MakeEvents) -> None:
    assert RunProgress().remaining(1.0) is None
    assert play(fake_events()[:3]).remaining(5.0) is None


@pytest.mark.parametrize("evaluate", [True, False])
@pytest.mark.parametrize("first_round", [1, 3])
def test_every_round_is_told_once_and_in_order(
    fake_events: MakeEvents, evaluate: bool, first_round: int
) -> None:
    progress, told = RunProgress(), []
    for now, event in fake_events(rounds=4, evaluate=evaluate, first_round=first_round):
        progress.apply(event, now)
        told += [
            (state.round, state.evaluation, state.committed) for state in progress.ready_to_tell()
        ]
    first_told = first_round - 1 if evaluate else first_round
    assert [number for number, _, _ in told] == list(range(first_told, 5))
    for number, evaluation, committed in told:
        assert (evaluation is not None) == evaluate
        assert (committed is not None) == (number >= first_round)
        assert evaluation is None or evaluation.round == number


def test_an_evaluation_belongs_to_the_round_that_it_names(fake_events: MakeEvents) -> None:
    progress = play(fake_events(rounds=3))
    for number, state in progress.rounds.items():
        assert state.evaluation is not None
        assert state.evaluation.round == number
    assert progress.previous_loss(2) == progress.rounds[1].evaluation.loss  # type: ignore[union-attr]


def reply(node: str, verdict: str, number: int = 1, bytes_up: int = 5) -> events.NodeReplied:
    return events.NodeReplied(number, node, verdict, "", 4, 2.0, 1.0, bytes_up, 6, 1.0)


def started(*nodes: str, rounds: int = 2) -> events.RunStarted:
    infos = tuple(events.NodeInfo(node, 4, 10, 2) for node in nodes)
    return events.RunStarted("run", "braid", rounds, 1, infos, "model", "runs/run")


@pytest.mark.parametrize("extra", ["late", "duplicate", "wrong_round"])
def test_a_second_reply_does_not_replace_the_one_that_counts(extra: str) -> None:
    told: list[events.Event] = [
        started("a"), events.RoundStarted(1), reply("a", "accepted"), reply("a", extra, bytes_up=99),
    ]  # fmt: skip
    node = play((float(i), event) for i, event in enumerate(told)).nodes["a"]
    assert (node.status, node.bytes_up) == ("accepted", 5)


def test_a_late_reply_of_an_earlier_round_leaves_the_node_at_work() -> None:
    told: list[events.Event] = [
        started("a"), events.RoundStarted(2), events.NodeStarted(2, "a"), reply("a", "late", 2),
    ]  # fmt: skip
    assert play((float(i), event) for i, event in enumerate(told)).nodes["a"].status == "working"


def test_nodes_that_said_nothing_are_missing_after_the_commit() -> None:
    commit = events.RoundCommitted(1, None, 0, 1, 0, 0, 1.0, 0, 0.0, "")
    told: list[events.Event] = [started("a"), events.RoundStarted(1), commit]
    progress = play((float(i), event) for i, event in enumerate(told))
    assert progress.nodes["a"].status == "missing"
    assert progress.share() == pytest.approx(0.5)


def test_without_progress_events_replies_tell_the_time(fake_events: MakeEvents) -> None:
    told = [
        (now, event)
        for now, event in fake_events(rounds=2, evaluate=False)
        if not isinstance(event, (events.NodeProgress, events.NodeStarted))
    ]
    progress = RunProgress()
    for now, event in told:
        progress.apply(event, now)
        remaining = progress.remaining(now)
        if remaining is not None:
            assert remaining == pytest.approx(told[-1][0] - now, abs=1e-6)


def test_work_after_the_last_round_is_the_final_evaluation(fake_events: MakeEvents) -> None:
    told = fake_events(rounds=2)
    cut = next(
        i for i, (_, e) in enumerate(told) if isinstance(e, events.NodeReplied) and e.round == 3
    )
    progress = play(told[: cut + 1])
    assert progress.evaluating
    assert progress.share() == pytest.approx(1.0)
    statuses: list[Any] = [node.status for node in progress.nodes.values()]
    assert statuses.count("accepted") == 1


def test_totals_add_up(fake_events: MakeEvents) -> None:
    told = fake_events(rounds=3)
    progress = play(told)
    commits = [event for _, event in told if isinstance(event, events.RoundCommitted)]
    assert progress.accepted == sum(commit.accepted for commit in commits)
    assert progress.refused == sum(commit.rejected for commit in commits)
    assert progress.bytes_up == sum(commit.bytes_up for commit in commits)
    assert progress.bytes_down == sum(commit.bytes_down for commit in commits)
