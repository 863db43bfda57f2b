"""Requests of operators to a run: a queue in its folder, which the coordinator reads between rounds.

A dashboard writes requests and never touches the ledger of a run that is under way. The coordinator
applies each once, records it as an ``operator`` entry, and then settles it here; a request whose id the
ledger holds already was applied before a crash.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTROL = "control.db"
OPERATOR = "operator"
"""The kind of a ledger entry that records an action."""

PENDING, APPLIED, REFUSED = "pending", "applied", "refused"
REQUESTED, DONE, FAILED = "requested", "done", "failed"
"""States of an export: a process of its own makes it, and only its outcome is recorded."""
EXPORTS = ("peft", "merged")
REVOKED = "revoked"
EXCLUDING = {"drain": "drained", "quarantine": "quarantined", "revoke": REVOKED}
ARGUMENTS: dict[str, frozenset[str]] = {
    "pause": frozenset(),
    "resume": frozenset(),
    "stop": frozenset({"now"}),
    "next_round": frozenset({"deadline_seconds", "quorum"}),
    **dict.fromkeys([*EXCLUDING, "readmit"], frozenset({"node"})),
    "rollback": frozenset({"round"}),
    "start": frozenset({"scenario", "overrides"}),
    "continue": frozenset(),
    "export": frozenset({"kind", "round", "to"}),
}
"""Every action, with the arguments that it takes.

A stop ends a run before its next round, and is recorded; with ``now`` at once, in the midst of one.
Then nothing is recorded, for nothing was decided: the run, resumed, has the ledger of an unstopped one.
"""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, action TEXT NOT NULL,
    arguments TEXT NOT NULL, who TEXT NOT NULL, role TEXT NOT NULL, reason TEXT NOT NULL,
    asked REAL NOT NULL, state TEXT NOT NULL, note TEXT NOT NULL, settled REAL
) STRICT;
"""


def stand(kept_out: dict[str, str], action: str, node: str) -> None:
    """Let a recorded action decide who is kept out of rounds, and how; who is revoked stays so."""
    if kept_out.get(node) == REVOKED:
        return
    if action in EXCLUDING:
        kept_out[node] = EXCLUDING[action]
    elif action == "readmit":
        kept_out.pop(node, None)


class ControlError(Exception):
    """A request cannot be made; the message says what it lacks."""


@dataclass(frozen=True)
class Request:
    """One action that somebody asked for. ``asked`` and ``settled`` are seconds since 1970."""

    id: str
    action: str
    arguments: dict[str, Any]
    who: str
    role: str
    reason: str
    asked: float
    state: str = PENDING
    note: str = ""
    settled: float | None = None

    def content(self) -> dict[str, Any]:
        """What the ledger hashes: no clock. Of an export with its outcome."""
        outcome = {"outcome": self.state, "note": self.note} if self.action == "export" else {}
        return {
            "request": self.id,
            "action": self.action,
            "arguments": self.arguments,
            "who": self.who,
            "role": self.role,
            "reason": self.reason,
            **outcome,
        }


class ControlQueue:
    """The queue of one run folder. Nothing is created before the first request."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / CONTROL

    def ask(
        self, action: str, arguments: Mapping[str, Any], *, who: str, role: str, reason: str
    ) -> Request:
        """Queue a request.

        Raises:
            ControlError: no such action, arguments that it does not take, or no reason.
        """
        check(action, arguments)
        if not reason.strip():
            raise ControlError("say why: the reason stands in the ledger")
        request = Request(
            uuid.uuid4().hex,
            action,
            dict(arguments),
            who,
            role,
            reason.strip()[:500],
            time.time(),
            REQUESTED if action == "export" else PENDING,
        )
        with self._database() as database:
            database.execute(
                "INSERT INTO requests (id, action, arguments, who, role, reason, asked, state, note)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, '')",
                (
                    request.id,
                    action,
                    json.dumps(request.arguments, allow_nan=False),
                    who,
                    role,
                    request.reason,
                    request.asked,
                    request.state,
                ),
            )
        return request

    def pending(self) -> list[Request]:
        """Requests that nobody has settled, in the order in which they were made."""
        return self._select("WHERE state = 'pending' ORDER BY number")

    def outcomes(self) -> list[Request]:
        """Exports that have ended and stand in no ledger yet, in their order."""
        return self._select("WHERE state IN ('done', 'failed') AND settled IS NULL ORDER BY number")

    def request(self, identity: str) -> Request | None:
        """The request of that id."""
        return next(iter(self._select("WHERE id = ?", identity)), None)

    def requests(self, limit: int = 200) -> list[Request]:
        """The newest requests, newest first."""
        return self._select("ORDER BY number DESC LIMIT ?", limit)

    def say(self, request: Request, state: str, note: str) -> None:
        """Say how an export ended; it is settled when it is recorded."""
        with self._database() as database:
            database.execute(
                "UPDATE requests SET state = ?, note = ? WHERE id = ?", (state, note, request.id)
            )

    def settle(self, request: Request, state: str, note: str = "") -> None:
        """Say what came of a request."""
        with self._database() as database:
            database.execute(
                "UPDATE requests SET state = ?, note = ?, settled = ? WHERE id = ?",
                (state, note, time.time(), request.id),
            )

    def _select(self, which: str, *values: Any) -> list[Request]:
        if not self._path.is_file():
            return []
        columns = "id, action, arguments, who, role, reason, asked, state, note, settled"
        with self._database() as database:
            rows = database.execute(f"SELECT {columns} FROM requests {which}", values).fetchall()
        return [Request(row[0], row[1], json.loads(row[2]), *row[3:]) for row in rows]

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._path, timeout=30)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(_SCHEMA)
            with database:
                yield database
        finally:
            database.close()


def check(action: str, arguments: Mapping[str, Any]) -> None:
    """Refuse what no run could carry out.

    Raises:
        ControlError: with what is wrong.
    """
    taken = ARGUMENTS.get(action)
    if taken is None:
        raise ControlError(f"there is no action {action!r}")
    if unknown := sorted(set(arguments) - taken):
        raise ControlError(f"{action} takes no {unknown[0]}")
    if "node" in taken and not arguments.get("node"):
        raise ControlError(f"{action}: name the node")
    if not isinstance(arguments.get("now", True), bool):
        raise ControlError("stop: now is true or false")
    if action == "next_round":
        if not arguments:
            raise ControlError("give a deadline or a quorum")
        deadline, quorum = arguments.get("deadline_seconds"), arguments.get("quorum")
        if deadline is not None and not (_is_number(deadline) and 0 < deadline <= 1e7):
            raise ControlError("a deadline is a number of seconds above 0")
        if quorum is not None and not (isinstance(quorum, int) and quorum >= 1):
            raise ControlError("a quorum is a whole number from 1")
    if action == "export" and arguments.get("kind") not in EXPORTS:
        raise ControlError(f"an export is one of {', '.join(EXPORTS)}")
    if action == "rollback":
        number = arguments.get("round")
        if not isinstance(number, int) or number < 0:
            raise ControlError("rollback: give the round whose model is to come back, from 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
