"""The ledger: an append-only, hash-chained log of rounds in SQLite, beside content-addressed blobs.

An entry's hash covers its height, kind, content and the previous hash. Wall-clock times stand beside
the hashed content, so two runs of one scenario have the same head. A round is committed by one
SQLite transaction after every blob that it names is on disk: it is in the ledger whole, or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

GENESIS_PREVIOUS = "0" * 64
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    height   INTEGER PRIMARY KEY,
    kind     TEXT NOT NULL,
    round    INTEGER NOT NULL,
    content  TEXT NOT NULL,
    previous TEXT NOT NULL,
    hash     TEXT NOT NULL UNIQUE,
    wall     TEXT NOT NULL
) STRICT;
"""

BLOBS, LOCK = "blobs", "ledger.lock"
ROUNDS_TO_CLEAN = 8


class LedgerError(Exception):
    """The ledger cannot be used as asked; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Entry:
    """One link of the chain. ``wall`` (seconds, timestamps) is not covered by ``hash``."""

    height: int
    kind: str
    round: int
    content: dict[str, Any]
    previous: str
    hash: str
    wall: dict[str, Any]


def canonical(content: Any) -> str:
    """JSON with sorted keys and no spaces; NaN and infinities are refused."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def entry_hash(height: int, kind: str, round_number: int, content: str, previous: str) -> str:
    """SHA-256 over the canonical form of an entry and its predecessor's hash."""
    text = canonical([height, kind, round_number, content, previous])
    return hashlib.sha256(text.encode()).hexdigest()


class Ledger:
    """The ledger of one run directory: ``ledger.db`` and ``blobs/``."""

    def __init__(self, folder: Path, *, create: bool = False, write: bool = False) -> None:
        """Open a ledger. Only one process at a time may ``create`` or ``write``; any may read."""
        self.folder = folder
        self._lock: IO[str] | None = None
        self._appended: str | None = None
        self._blobs = folder / BLOBS
        path = folder / "ledger.db"
        if not create and not path.is_file():
            raise LedgerError(f"{folder} holds no ledger; give the folder of a run (runs/NAME)")
        if create:
            self._blobs.mkdir(parents=True, exist_ok=True)
        if create or write:
            self._lock = _locked(folder)
        try:
            self._database = sqlite3.connect(
                path, timeout=30, isolation_level=None, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{path} cannot be read as a ledger: {error}") from None

    def close(self) -> None:
        """Close the database and let others write; the run directory may then be moved."""
        self._database.close()
        if self._lock is not None:
            self._lock.close()

    @property
    def height(self) -> int:
        """Number of entries."""
        return int(self._read("SELECT COUNT(*) FROM entries")[0][0])

    @property
    def head(self) -> str:
        """Hash of the last entry; 64 zeros for an empty ledger."""
        rows = self._read("SELECT hash FROM entries ORDER BY height DESC LIMIT 1")
        return str(rows[0][0]) if rows else GENESIS_PREVIOUS

    def entries(self, kind: str | None = None) -> Iterator[Entry]:
        """All entries in order, or those of one kind."""
        yield from self._entries("WHERE ?1 IS NULL OR kind = ?1 ORDER BY height", kind)

    def _entries(self, which: str, *values: Any) -> Iterator[Entry]:
        columns = "height, kind, round, content, previous, hash, wall"
        rows = self._read(f"SELECT {columns} FROM entries {which}", *values)
        for height, name, number, content, previous, digest, wall in rows:
            try:
                content, wall = json.loads(content), json.loads(wall)
            except ValueError:
                raise LedgerError(
                    f"{self.folder}: entry {height} is not JSON: the ledger was changed; restore"
                    " it from a copy"
                ) from None
            yield Entry(height, name, number, content, previous, digest, wall)

    def last(self, kind: str) -> Entry | None:
        """The newest entry of a kind."""
        return next(self._entries("WHERE kind = ? ORDER BY height DESC LIMIT 1", kind), None)

    def append(
        self, kind: str, round_number: int, content: dict[str, Any], wall: dict[str, Any]
    ) -> Entry:
        """Commit one entry durably. Its blobs must have been put before."""
        text = canonical(content)
        self._database.execute("BEGIN IMMEDIATE")
        try:
            height, previous = self.height, self.head
            if self._appended not in (None, previous):
                raise sqlite3.IntegrityError("another process appended to it")
            digest = entry_hash(height, kind, round_number, text, previous)
            self._database.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)",
                (height, kind, round_number, text, previous, digest, canonical(wall)),
            )
            self._database.execute("COMMIT")
            self._appended = digest
        except sqlite3.Error as error:
            self._database.rollback()
            raise LedgerError(
                f"{self.folder}: the {kind} entry could not be written: {error}; free some space and"
                " continue with --resume"
            ) from None
        return Entry(height, kind, round_number, content, previous, digest, wall)

    def put(self, data: bytes) -> str:
        """Store bytes durably under their SHA-256; storing them again is free."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        if path.exists():
            return digest
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise LedgerError(
                f"{self.folder}: {len(data)} bytes could not be stored: {error.strerror};"
                " free some space and continue with --resume"
            ) from None
        _synchronise(path.parent)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of a blob, checked against their digest."""
        try:
            data = self._path(digest).read_bytes()
        except OSError:
            raise LedgerError(f"blob {digest} is missing from {self._blobs}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise LedgerError(f"blob {digest} was changed on disk")
        return data

    def forget(self, digest: str) -> None:
        """Delete a blob that is damaged, so that ``put`` can store it again."""
        self._path(digest).unlink(missing_ok=True)

    def has(self, digest: str) -> bool:
        """Whether a blob is on disk."""
        return self._path(digest).is_file()

    def keep_states(self, wanted: set[str]) -> None:
        """Delete state blobs that later rounds made superfluous, and crashed writers' leftovers.

        A state follows from the updates before it, so only the newest ones are kept. Every round
        cleans up, so that only the last few can have left something.
        """
        newest = self._entries("WHERE kind = 'round' ORDER BY height DESC LIMIT ?", ROUNDS_TO_CLEAN)
        for digest in {entry.content["state"] for entry in newest} - wanted:
            self._path(digest).unlink(missing_ok=True)
        for leftover in self._blobs.glob("*/*.part"):
            leftover.unlink(missing_ok=True)

    def verify(self, *, state: bool = True) -> list[str]:
        """Problems of the chain and of the blobs that it names; empty when all is sound.

        Of the states only the last is needed, and it can be made again (``state`` False: ignore it).
        A chain that was cut off at its end is still a chain;
        the head that ``summary.json`` names tells.
        """
        problems = []
        previous = GENESIS_PREVIOUS
        try:
            rows = self._read(
                "SELECT height, kind, round, content, previous, hash FROM entries ORDER BY height"
            )
        except LedgerError as error:
            return [str(error)]
        if not rows:
            problems.append("the ledger is empty")
        newest: tuple[int, str] | None = None
        for expected, (height, kind, number, content, before, digest) in enumerate(rows):
            if height != expected:
                problems.append(f"height {expected} is missing")
            if before != previous:
                problems.append(f"entry {height}: does not follow the entry before it")
            if entry_hash(height, kind, number, content, before) != digest:
                problems.append(f"entry {height}: its content was changed")
            previous = digest
            try:
                found = json.loads(content)
                updates = [node["update"] for node in found.get("nodes", ()) if node.get("update")]
                named = [*updates, *filter(None, [found.get("layout_blob")])]
                newest = (height, found["state"]) if kind == "round" else newest
            except (ValueError, KeyError, TypeError, AttributeError):
                problems.append(f"entry {height}: its content cannot be read")
                continue
            problems += self._bad_blobs(height, named)
        if state and newest is not None:
            remedy = "; --resume or export makes this state again from the updates"
            problems += [p + remedy for p in self._bad_blobs(newest[0], [newest[1]])]
        named_head = self._summarised_head()
        if named_head and named_head not in [row[5] for row in rows]:
            problems.append(
                f"summary.json names the head {named_head[:16]}, which is not in the ledger: entries"
                " are missing at its end"
            )
        return problems

    def _read(self, query: str, *values: Any) -> list[Any]:
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"{self.folder / 'ledger.db'} cannot be read: {error}; restore it from a copy"
            ) from None

    def _summarised_head(self) -> str:
        try:
            found = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        return str(found.get("head") or "") if isinstance(found, dict) else ""

    def _bad_blobs(self, height: int, digests: Iterable[str]) -> list[str]:
        problems = []
        for digest in digests:
            try:
                self.get(digest)
            except LedgerError as error:
                problems.append(f"entry {height}: {error}")
        return problems

    def _path(self, digest: str) -> Path:
        return self._blobs / digest[:2] / f"{digest}.safetensors"


def _locked(folder: Path) -> IO[str]:
    """An advisory lock on the folder, which ends with the process, however it ends."""
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise LedgerError(
            f"{folder}: another process is running this run; wait for its end, or stop it"
        ) from None
    return file


def _synchronise(folder: Path) -> None:
    """Make a rename durable: on Linux the folder itself has to reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
