"""How far a run is: events go in, the state that a view shows comes out. No clock, no terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fedserver import events
from fedserver.events import ACCEPTED, BASE_ROUND

WAITING, WORKING = "waiting", "working"
LATE = "late"


@dataclass
class NodeState:
    """A node in the current round. ``status``: waiting, working, or the verdict of its reply."""

    node: str
    sends: str
    status: str = WAITING
    step: int = 0
    steps: int = 0
    loss: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None

    @property
    def share(self) -> float:
        """How much of its work is done, 0 to 1."""
        if self.status not in (WAITING, WORKING):
            return 1.0
        return min(self.step / self.steps, 1.0) if self.steps else 0.0


@dataclass
class RoundState:
    """A round that was committed, that was evaluated, or both; they come at different times."""

    round: int
    committed: events.RoundCommitted | None = None
    evaluation: events.EvaluationDone | None = None
    told: bool = False


@dataclass
class Pace:
    """Seconds per unit of work, smoothed: a sum over the recent past, whose weight decays.

    A ratio of decayed sums, not a mean of ratios: a burst of quick steps after a slow evaluation
    moves it little, and a constant pace is estimated exactly.
    """

    horizon: float
    seconds: float = 0.0
    work: float = 0.0
    last_time: float = 0.0
    last_done: float = 0.0

    def observe(self, now: float, done: float) -> None:
        """Work ``done`` in all by the time ``now``."""
        advance = done - self.last_done
        if advance <= 0:
            return
        kept = math.exp(-advance / self.horizon)
        self.seconds = self.seconds * kept + max(now - self.last_time, 0.0)
        self.work = self.work * kept + advance
        self.last_time, self.last_done = now, done

    def remaining(self, now: float, total: float) -> float | None:
        """Seconds until ``total`` is done; None before anything was."""
        if not self.work:
            return None
        expected = self.seconds / self.work * max(total - self.last_done, 0.0)
        return max(expected - (now - self.last_time), 0.0)


@dataclass
class RunProgress:
    """The state of a run, fed by :meth:`apply`."""

    run: events.RunStarted | None = None
    finished: events.RunFinished | None = None
    current: int = 0
    evaluating: bool = False
    nodes: dict[str, NodeState] = field(default_factory=dict)
    rounds: dict[int, RoundState] = field(default_factory=dict)
    accepted: int = 0
    refused: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    began: float | None = None
    _pace: Pace | None = None
    _steps: dict[str, int] = field(default_factory=dict)
    _completed: int = 0

    def apply(self, event: events.Event, now: float) -> None:
        """Take in one event that happened at ``now`` (seconds on any clock that only advances)."""
        if self.began is None:
            self.began = now
        match event:
            case events.RunStarted():
                self.run = event
                # A run that goes on has done nothing yet of what is left to it.
                self.current, self.evaluating = 0, False
                self._pace, self._completed = None, 0
                self._reset()
            case events.RoundStarted():
                self._start_round(event.round, now)
            case events.NodeStarted():
                self._start_node(event)
            case events.NodeProgress():
                self._advance(event, now)
            case events.NodeReplied():
                self._reply(event, now)
            case events.EvaluationDone():
                self._round(event.round).evaluation = event
            case events.RoundCommitted():
                self._commit(event, now)
            case events.RunFinished():
                self.finished = event
            case events.Notice():
                pass

    def elapsed(self, now: float) -> float:
        """Seconds since the first event."""
        return 0.0 if self.began is None else max(now - self.began, 0.0)

    def remaining(self, now: float) -> float | None:
        """Seconds until the last round is done, as far as the pace so far tells."""
        return self._pace.remaining(now, self._total()) if self._pace else None

    def share(self) -> float:
        """How much of the local steps since this start are done, 0 to 1."""
        total = self._total()
        return min(self._done() / total, 1.0) if total else 0.0

    def previous_loss(self, round_number: int) -> float | None:
        """Evaluation loss of the newest evaluated model before a round's."""
        found = [
            (number, state.evaluation.loss)
            for number, state in self.rounds.items()
            if number < round_number and state.evaluation is not None
        ]
        return max(found)[1] if found else None

    def ready_to_tell(self) -> list[RoundState]:
        """Rounds of which all is known that will be, in order; each is given out once.

        A round's evaluation comes before the commit of the next round, or never.
        """
        newest = max((r for r, s in self.rounds.items() if s.committed), default=0)
        ready = [
            state
            for number, state in sorted(self.rounds.items())
            if not state.told
            and (
                self.finished is not None
                or number < newest
                or (
                    state.evaluation is not None
                    and (state.committed is not None or number < self._first_round())
                )
            )
        ]
        for state in ready:
            state.told = True
        return ready

    def _first_round(self) -> int:
        return self.run.first_round if self.run else 1

    def _round(self, number: int) -> RoundState:
        return self.rounds.setdefault(number, RoundState(number))

    def _reset(self) -> None:
        """Put every node at the start of a phase."""
        known = self.run.nodes if self.run else ()
        self.nodes = {info.node: NodeState(info.node, info.sends) for info in known}

    def _start_round(self, number: int, now: float) -> None:
        self.current, self.evaluating = number, False
        self._reset()
        if self._pace is None:
            # Loading the model comes before the first round: it says nothing about the rest.
            self._pace = Pace(horizon=max(self._total() / 6, 1.0), last_time=now)

    def _start_node(self, event: events.NodeStarted) -> None:
        if (
            event.round in self.rounds
            and self.rounds[event.round].committed
            and not self.evaluating
        ):
            # Work after the commit of the last round is the final evaluation.
            self.evaluating = True
            self._reset()
        self._node(event.node).status = WORKING

    def _advance(self, event: events.NodeProgress, now: float) -> None:
        node = self._node(event.node)
        if node.status == WAITING:
            node.status = WORKING
        node.step, node.steps = event.step, event.steps
        node.loss = event.loss if event.loss is not None else node.loss
        if event.steps > 0:
            self._steps[event.node] = event.steps
        self._observe(now)

    def _reply(self, event: events.NodeReplied, now: float) -> None:
        if self.run is not None and event.round > self.run.rounds and not self.evaluating:
            self.evaluating = True
            self._reset()
        node = self._node(event.node)
        # A late reply belongs to an earlier round, a second one is not the one that counts.
        if event.verdict == LATE or node.status not in (WAITING, WORKING):
            return
        node.status, node.sends = event.verdict, event.sends
        node.bytes_up, node.bytes_down = event.bytes_up, event.bytes_down
        node.loss = event.train_loss if event.train_loss is not None else node.loss
        self._observe(now)

    def _commit(self, event: events.RoundCommitted, now: float) -> None:
        self._round(event.round).committed = event
        self.accepted += event.accepted
        self.refused += event.rejected
        self.bytes_up += event.bytes_up
        self.bytes_down += event.bytes_down
        self._completed = max(self._completed, event.round - self._first_round() + 1)
        for node in self.nodes.values():
            if node.status in (WAITING, WORKING):
                node.status = "missing"
        self._observe(now)

    def _node(self, name: str) -> NodeState:
        return self.nodes.setdefault(name, NodeState(name, ""))

    def _observe(self, now: float) -> None:
        if self._pace is not None and not self.evaluating:
            self._pace.observe(now, self._done())

    def _work(self, name: str) -> float:
        """Local steps of a node in one round; before they are known, those of the others."""
        if name in self._steps or not self._steps:
            return float(self._steps.get(name, 1))
        return sum(self._steps.values()) / len(self._steps)

    def _done(self) -> float:
        per_round = sum(self._work(name) for name in self.nodes)
        inside = self.current - self._first_round() + 1 > self._completed and not self.evaluating
        partial = sum(self._work(n.node) * n.share for n in self.nodes.values()) if inside else 0.0
        return self._completed * per_round + partial

    def _total(self) -> float:
        if self.run is None:
            return 0.0
        rounds = max(self.run.rounds - self.run.first_round + 1, 0)
        return rounds * sum(self._work(name) for name in self.nodes)


def is_refusal(event: events.NodeReplied) -> bool:
    """Whether a reply was not accepted."""
    return event.verdict != ACCEPTED


def is_base(state: RoundState) -> bool:
    """Whether this is the evaluation of the base model."""
    return state.round == BASE_ROUND
