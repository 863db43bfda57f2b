"""Who may speak to the server: invitations, nodes, and the signed times that were used already.

One SQLite file. Of a token only hashes are kept. Every change is one transaction, so the command line
and the enrolment service may work on it at the same time.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedhost.enrolment import EnrolmentRefused, JoinRequest, Token, verifier_of
from fedhost.node_signature import EARLIEST_SECONDS, OLDEST_SECONDS, Signed

SCHEMA = """
CREATE TABLE IF NOT EXISTS invitations (
    name TEXT PRIMARY KEY, verifier TEXT UNIQUE NOT NULL, locator TEXT UNIQUE NOT NULL,
    expires REAL NOT NULL, used REAL
);
CREATE TABLE IF NOT EXISTS nodes (
    transport_key TEXT PRIMARY KEY, update_key TEXT UNIQUE NOT NULL, name TEXT NOT NULL,
    verifier TEXT NOT NULL, joined REAL NOT NULL, revoked REAL
);
CREATE UNIQUE INDEX IF NOT EXISTS one_node_a_name ON nodes (name) WHERE revoked IS NULL;
CREATE TABLE IF NOT EXISTS seen (
    transport_key TEXT NOT NULL, time TEXT NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (transport_key, time)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS seen_by_age ON seen (seconds);
"""
BUSY_SECONDS = 10.0
# Old signed times are thrown away after this many new ones.
SWEEP_EVERY = 1000


@dataclass(frozen=True)
class Node:
    """An enrolled device. ``revoked``: when it was shut out, or left."""

    name: str
    transport_key: str
    update_key: str
    joined: float
    revoked: float | None


class EnrolledKeys(Mapping[str, str]):
    """The keys (hex) by which the nodes enrolled now sign updates, by name; read anew at every look.

    A run takes hours: nodes that join meanwhile belong to it, and revoked ones no longer do.
    """

    def __init__(self, path: Path) -> None:
        self._registry = Registry(path)

    def __getitem__(self, name: str) -> str:
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def revoked(self) -> frozenset[str]:
        """Names of the nodes that were shut out, or left, and have not joined anew."""
        nodes = self._registry.nodes()
        here = {node.name for node in nodes if node.revoked is None}
        return frozenset(node.name for node in nodes) - here

    def _now(self) -> dict[str, str]:
        nodes = self._registry.nodes()
        return {node.name: node.update_key for node in nodes if node.revoked is None}


class Registry:
    """The registry in one file; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        path.chmod(0o600)
        self._connection.execute("PRAGMA journal_mode = WAL")
        # A signed time is written for each request; only a power cut could lose the last of them.
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.executescript(SCHEMA)
        self._since_sweep = 0

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def invite(self, name: str, token: Token, expires: float) -> None:
        """Keep an invitation; one of the same name that nobody has used is replaced.

        Raises EnrolmentRefused (name-taken) while a node of that name is enrolled.
        """
        with self._transaction() as run:
            if run.execute(
                "SELECT 1 FROM nodes WHERE name = ? AND revoked IS NULL", (name,)
            ).fetchone():
                raise EnrolmentRefused(
                    "name-taken", f"{name!r} has joined already: revoke it first, or choose a name"
                )
            run.execute(
                "INSERT OR REPLACE INTO invitations VALUES (?, ?, ?, ?, NULL)",
                (name, token.verifier, token.locator, expires),
            )

    def is_invited(self, locator: str, now: float) -> bool:
        """Whether an invitation of this locator may still be used, or was by its device."""
        with self._transaction() as run:
            found = run.execute(
                "SELECT 1 FROM invitations WHERE locator = ? AND expires > ?", (locator, now)
            ).fetchone()
        return found is not None

    def redeem(self, request: JoinRequest, now: float) -> Node:
        """Turn an invitation into a node, once.

        The same device may repeat its request while the token is valid: its first answer may have been
        lost. Raises EnrolmentRefused: unknown-token, expired-token, used-token, key-taken, revoked.
        """
        verifier = verifier_of(bytes.fromhex(request.secret))
        with self._transaction() as run:
            invitation = run.execute(
                "SELECT name, expires, used FROM invitations WHERE verifier = ?", (verifier,)
            ).fetchone()
            if invitation is None:
                raise EnrolmentRefused("unknown-token", "no invitation has this token: ask for one")
            name, expires, used = invitation
            if now >= expires:
                raise EnrolmentRefused("expired-token", f"the token of {name!r} has expired")
            if used is not None:
                return self._repeated(run, request, verifier, name)
            if run.execute(
                "SELECT 1 FROM nodes WHERE transport_key = ? OR update_key = ?",
                (request.transport_key, request.update_key),
            ).fetchone():
                raise EnrolmentRefused("key-taken", "this device's keys have been used before")
            run.execute("UPDATE invitations SET used = ? WHERE verifier = ?", (now, verifier))
            run.execute(
                "INSERT INTO nodes VALUES (?, ?, ?, ?, ?, NULL)",
                (request.transport_key, request.update_key, name, verifier, now),
            )
        return Node(name, request.transport_key, request.update_key, now, None)

    @staticmethod
    def _repeated(run: sqlite3.Connection, request: JoinRequest, verifier: str, name: str) -> Node:
        row = run.execute(
            "SELECT name, transport_key, update_key, joined, revoked FROM nodes"
            " WHERE verifier = ? AND transport_key = ? AND update_key = ?",
            (verifier, request.transport_key, request.update_key),
        ).fetchone()
        if row is None:
            raise EnrolmentRefused("used-token", f"the token of {name!r} has been used already")
        node = Node(*row)
        if node.revoked is not None:
            raise EnrolmentRefused("revoked", f"{node.name!r} has been revoked: ask for a token")
        return node

    def revoke(self, name: str, now: float) -> bool:
        """Shut a node out and make its unused invitation void; False when there is neither."""
        with self._transaction() as run:
            gone = run.execute(
                "UPDATE nodes SET revoked = ? WHERE name = ? AND revoked IS NULL", (now, name)
            ).rowcount
            void = run.execute(
                "DELETE FROM invitations WHERE name = ? AND used IS NULL", (name,)
            ).rowcount
        return bool(gone or void)

    def withdraw(self, token: Token) -> None:
        """Make one invitation void, unless it was used; another of the same name stands."""
        with self._transaction() as run:
            run.execute(
                "DELETE FROM invitations WHERE verifier = ? AND used IS NULL", (token.verifier,)
            )

    def admit(self, signed: Signed) -> Node:
        """The node behind a signed request, whose time is used up by this.

        Raises EnrolmentRefused: unknown-node, revoked, replayed.
        """
        with self._transaction() as run:
            row = run.execute(
                "SELECT name, transport_key, update_key, joined, revoked FROM nodes"
                " WHERE transport_key = ?",
                (signed.key,),
            ).fetchone()
            if row is None:
                raise EnrolmentRefused("unknown-node", "no node has joined with this key")
            node = Node(*row)
            if node.revoked is not None:
                raise EnrolmentRefused("revoked", f"{node.name!r} has been revoked")
            fresh = run.execute(
                "INSERT OR IGNORE INTO seen VALUES (?, ?, ?)",
                (signed.key, signed.text, signed.seconds),
            ).rowcount
            if not fresh:
                raise EnrolmentRefused("replayed", "this request has been made before")
            self._since_sweep += 1
            if self._since_sweep >= SWEEP_EVERY:
                self._since_sweep = 0
                oldest = signed.seconds - OLDEST_SECONDS - EARLIEST_SECONDS
                run.execute("DELETE FROM seen WHERE seconds < ?", (oldest,))
        return node

    def nodes(self) -> list[Node]:
        """All that ever joined, in the order of joining."""
        with self._transaction() as run:
            rows = run.execute(
                "SELECT name, transport_key, update_key, joined, revoked FROM nodes ORDER BY joined"
            ).fetchall()
        return [Node(*row) for row in rows]

    def open_invitations(self, now: float) -> dict[str, float]:
        """When the invitations that nobody has used yet expire, by name."""
        with self._transaction() as run:
            rows = run.execute(
                "SELECT name, expires FROM invitations WHERE used IS NULL AND expires > ?", (now,)
            ).fetchall()
        return dict(rows)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
