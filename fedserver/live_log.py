"""What a run is doing now, for those who only read its folder: ``events.jsonl`` and ``live.json``.

``events.jsonl`` grows by one line an event. ``live.json`` is replaced whole at every phase: it is small
whatever the number of nodes, and names the byte of the log at which the current round begins, so that
a reader who comes late reads one round and not the history.

Neither is part of the run's numbers: the ledger holds those, and a log that cannot be written is given
up with one notice while the run goes on.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fedhost.process_identity import is_alive, process_identity
from fedserver import events

EVENTS, LIVE = "events.jsonl", "live.json"
WAITING = ("paused", "held")
"""Phases in which a run goes on when somebody acts: asked to pause, or without a node to train."""
ALIVE = ("running", *WAITING)
"""States of a run whose process is at work."""
SECONDS_BETWEEN_STEPS = 0.5
"""A node's steps are worth a line this often, and at its last one."""


class LiveLog:
    """A listener that passes every event on, and writes it into the run's folder once there is one."""

    def __init__(
        self, folder: Path, emit: events.Listener, *, now: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        self._emit = emit
        self._now = now
        self._file: BinaryIO | None = None
        self._early: list[events.Event] = []
        self._state: dict[str, Any] = {}
        self._told: dict[str, float] = {}
        self._given_up = False

    def __call__(self, event: events.Event) -> None:
        """Take one event."""
        if not self._given_up:
            try:
                self._record(event)
            except OSError as error:
                self._given_up = True
                text = f"the live log could not be written: {error.strerror}; the run goes on"
                self._emit(events.Notice("warning", text))
        self._emit(event)

    def _record(self, event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            self._open(event)
            for early in self._early:
                self._append(early)
            self._early.clear()
        if self._file is None:
            # There is no folder yet: who cannot take part is known before the ledger begins.
            self._early.append(event)
            return
        if isinstance(event, events.NodeProgress) and not self._worth_a_line(event):
            return
        offset = self._append(event)
        match event:
            case events.RunStarted():
                self._state |= {"run_offset": offset, "round_offset": offset}
                self._replace(state="running", phase="plan", round=event.first_round)
            case events.RoundStarted():
                self._told.clear()
                self._replace(round=event.round, round_offset=offset, round_started=self._now())
            case events.PhaseStarted():
                self._replace(
                    phase=event.phase,
                    phase_started=self._now(),
                    asked=event.nodes,
                    quorum=event.quorum,
                    deadline_seconds=event.deadline_seconds,
                    reason=event.reason,
                )
            case events.RoundCommitted():
                self._replace(committed=event.round, head=event.head)
            case events.RoundsEnded():
                self._replace(state=event.outcome, phase="", reason=event.reason)
                self._file.close()
                self._file = None
                self._given_up = True
            case _:
                pass

    def _open(self, event: events.RunStarted) -> None:
        self._file = (self._folder / EVENTS).open("ab", buffering=0)
        if self._file.tell() and not _ends_with_newline(self._folder / EVENTS):
            self._file.write(b"\n")  # a writer that was killed left half a line
        self._state = {
            "name": event.name,
            "preset": event.preset,
            "base_model": event.base_model,
            "rounds": event.rounds,
            "first_round": event.first_round,
            "nodes": len(event.nodes),
            "model_bytes_a_node": event.model_bytes_a_node,
            "lora_bytes_a_rank": event.lora_bytes_a_rank,
            "real_time": event.real_time,
            "seed": event.seed,
            "started": self._now(),
            "process": process_identity(os.getpid()),
            "host": socket.gethostname(),
            "committed": event.first_round - 1,
            "reason": "",
        }

    def _append(self, event: events.Event) -> int:
        """Write one line; returns the offset at which it begins."""
        assert self._file is not None
        offset = self._file.seek(0, os.SEEK_END)
        line = json.dumps({"time": round(self._now(), 3), **events.to_json(event)}) + "\n"
        self._file.write(line.encode())
        return offset

    def _worth_a_line(self, event: events.NodeProgress) -> bool:
        now = self._now()
        if event.step < event.steps and now < self._told.get(event.node, 0) + SECONDS_BETWEEN_STEPS:
            return False
        self._told[event.node] = now
        return True

    def _replace(self, **changes: Any) -> None:
        self._state |= changes | {"updated": self._now()}
        target = self._folder / LIVE
        draft = target.with_name(f".{LIVE}.{os.getpid()}")
        draft.write_text(json.dumps(self._state), encoding="utf-8")
        draft.replace(target)


def state_of(live: dict[str, Any]) -> str:
    """running, paused, held, or how it ended; interrupted where the process has gone; "" if unknown."""
    state = str(live.get("state") or "")
    if state == "running" and not is_running(live):
        return "interrupted"
    phase = str(live.get("phase") or "")
    return phase if state == "running" and phase in WAITING else state


def is_running(live: dict[str, Any]) -> bool:
    """Whether the process that wrote a ``live.json`` still runs; on another host: as far as it said."""
    if live.get("state") != "running":
        return False
    process = live.get("process")
    if live.get("host") != socket.gethostname() or not isinstance(process, str):
        return True
    return is_alive(process)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
