"""Operators' actions as a run carries them out: between rounds, each recorded before it has an effect.

What stands after them follows from the ledger's ``operator`` entries alone, so a run that is resumed
stands where it stood. Without a request there is no entry, and the ledger's head is what it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fedserver import events
from fedserver.configuration import RunConfiguration
from fedserver.control import (
    APPLIED,
    EXCLUDING,
    OPERATOR,
    REFUSED,
    REVOKED,
    ControlError,
    ControlQueue,
    Request,
    check,
    stand,
)
from fedserver.global_model import GlobalModel
from fedserver.ledger import Entry, Ledger
from fedserver.replay import model_after

PAUSED_POLL_SECONDS = 0.25

Attendance = Callable[[], tuple[int, int]]
"""How many updates may come in the next round, and how many it needs."""


class Operations:
    """The actions that are in force in one run."""

    def __init__(
        self,
        ledger: Ledger,
        configuration: RunConfiguration,
        nodes: Sequence[str],
        emit: events.Listener,
        *,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._ledger = ledger
        self._configuration = configuration
        self._queue = ControlQueue(ledger.folder)
        self._nodes = frozenset(nodes) | {node.name for node in configuration.nodes}
        self._emit = emit
        self._wait = wait
        self._recorded: set[str] = set()
        self._next: dict[str, Any] = {}
        self._next_round = 0
        self.paused = False
        self.stopped_by = ""
        self.excluded: dict[str, str] = {}
        self._came_back: dict[int, int] = {}
        for entry in ledger.entries(OPERATOR):
            self._take_in(entry)
        # A stop was carried out when the run ended; who resumes it wants it to go on.
        self.stopped_by = ""

    def before(
        self,
        number: int,
        model: GlobalModel,
        attendance: Attendance,
        meet: Callable[[], None],
    ) -> GlobalModel:
        """Apply what was asked, wait while paused or held; the model that round ``number`` starts from.

        A run is held while operators keep so many nodes out that ``attendance`` cannot reach the quorum,
        for its rounds would pass with nothing in them. ``meet`` lets nodes in that join while it waits.
        Afterwards ``stopped_by`` names who stopped the run, "" where it goes on.
        """
        told = ("", "")
        while True:
            for request in self._queue.pending():
                model = self._carry_out(request, number, model)
            self._record_outcomes(number)
            reason = _too_few(*attendance()) if self.excluded else ""
            if self.stopped_by or not (self.paused or reason):
                return model
            phase = "paused" if self.paused else "held"
            if (phase, reason) != told:
                told = (phase, reason)
                self._emit(events.PhaseStarted(number, phase, reason=reason))
                text = f"paused before round {number}: resume it in fedbraid dashboard"
                if phase == "held":
                    text = f"held before round {number}: {reason}, in fedbraid dashboard"
                self._emit(events.Notice("warning" if reason else "info", text))
            self._wait(PAUSED_POLL_SECONDS)
            meet()

    def stops_now(self) -> bool:
        """Whether to leave the round under way as it is; what has arrived stays for who resumes it."""
        for request in self._queue.pending():
            if _is_at_once(request):
                self._stop_now(request)
        return bool(self.stopped_by)

    def _stop_now(self, request: Request) -> None:
        self._queue.settle(request, APPLIED)
        self.stopped_by = request.who

    def deadline_seconds(self, number: int) -> float:
        """The deadline of a round."""
        asked = self._next.get("deadline_seconds") if number == self._next_round else None
        return self._configuration.deadline_seconds if asked is None else float(asked)

    def quorum(self, number: int, needed: int) -> int:
        """The accepted updates that a round needs, where ``needed`` are what the scenario says."""
        asked = self._next.get("quorum") if number == self._next_round else None
        return needed if asked is None else int(asked)

    def entering(self, number: int) -> int:
        """The round whose model the nodes of round ``number`` receive, and evaluate."""
        return self._came_back.get(number, number - 1)

    def end(self) -> None:
        """Settle what came too late; how exports ended is still recorded."""
        last = self._ledger.last("round")
        self._record_outcomes(last.round if last is not None else 0)
        for request in self._queue.pending():
            if request.id in self._recorded:
                self._queue.settle(request, APPLIED)
            else:
                self._queue.settle(request, REFUSED, "the run has ended")

    def _record_outcomes(self, number: int) -> None:
        for request in self._queue.outcomes():
            if request.id not in self._recorded:
                wall = {"asked": request.asked, "applied": time.time()}
                self._take_in(self._ledger.append(OPERATOR, number, request.content(), wall))
            self._queue.settle(request, request.state, request.note)

    def _carry_out(self, request: Request, number: int, model: GlobalModel) -> GlobalModel:
        if request.id in self._recorded:
            self._queue.settle(request, APPLIED)
            return model
        if _is_at_once(request):
            self._stop_now(request)
            return model
        content = request.content()
        try:
            check(request.action, request.arguments)
            self._check(request, number)
            if request.action == "rollback":
                model = model_after(self._ledger, self._configuration, request.arguments["round"])
                content |= {"state": self._ledger.put(model.to_bytes())}
        except ControlError as refusal:
            self._queue.settle(request, REFUSED, str(refusal))
            self._emit(events.Notice("warning", f"{request.action} refused: {refusal}"))
            return model
        wall = {"asked": request.asked, "applied": time.time()}
        self._take_in(self._ledger.append(OPERATOR, number, content, wall))
        self._queue.settle(request, APPLIED, f"before round {number}")
        what = request.action.replace("_", " ")
        text = f"{what} by {request.who} ({request.role}) before round {number}: {request.reason}"
        self._emit(events.Notice("info", text))
        return model

    def _check(self, request: Request, number: int) -> None:
        """Refuse what this run cannot do now."""
        match request.action:
            case "pause" if self.paused:
                raise ControlError("it is paused already")
            case "resume" if not self.paused:
                raise ControlError("it is not paused")
            case "rollback" if request.arguments["round"] >= number:
                raise ControlError(f"round {request.arguments['round']} is not committed yet")
            case "rollback" if request.arguments["round"] == number - 1:
                raise ControlError(f"the model is that of round {number - 1} already")
            case "next_round":
                quorum = request.arguments.get("quorum")
                able = len(self._nodes - set(self.excluded))
                if quorum is not None and quorum > able:
                    raise ControlError(f"quorum {quorum} exceeds the {able} nodes that take part")
            case "stop" if self.stopped_by:
                raise ControlError(f"{self.stopped_by} stops it already")
            case "readmit" | "drain" | "quarantine" | "revoke":
                self._check_standing(request.action, request.arguments["node"])
            case _:
                pass

    def _check_standing(self, action: str, node: str) -> None:
        standing = self.excluded.get(node)
        if node not in self._nodes and standing is None:
            raise ControlError(f"the run has no node {node!r}")
        if standing == REVOKED:
            raise ControlError(f"{node} is revoked, and does not come back in this run")
        if standing == EXCLUDING.get(action):
            raise ControlError(f"{node} {f'is {standing}' if standing else 'takes part'} already")

    def _take_in(self, entry: Entry) -> None:
        """Let a recorded action stand."""
        content = entry.content
        action, arguments = content["action"], content["arguments"]
        self._recorded.add(content["request"])
        match action:
            case "pause" | "resume":
                self.paused = action == "pause"
            case "stop":
                self.stopped_by = str(content["who"])
                self.paused = False
            case "next_round":
                earlier = self._next if entry.round == self._next_round else {}
                self._next, self._next_round = earlier | arguments, entry.round
            case "rollback":
                self._came_back[entry.round] = arguments["round"]
            case _ if "node" in arguments:
                stand(self.excluded, action, arguments["node"])
            case _:
                pass


def _too_few(able: int, needed: int) -> str:
    """Why a round would be in vain, and what to do; "" where it would not."""
    if not able:
        return "no node may train: readmit one, or stop the run"
    if able < needed:
        nodes = "1 node may train" if able == 1 else f"{able} nodes may train"
        return (
            f"{nodes} and a round needs {needed} updates: readmit one, lower the quorum of the next"
            " round, or stop the run"
        )
    return ""


def _is_at_once(request: Request) -> bool:
    return request.action == "stop" and request.arguments.get("now") is True
