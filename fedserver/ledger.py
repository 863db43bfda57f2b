"""The ledger: an append-only, hash-chained, sealed log of rounds in SQLite, beside its blobs.

An entry's hash covers its height, kind, content and the previous hash. Wall-clock times and the nodes'
signatures stand beside the hashed content, so two runs of one scenario have the same head; the server's
seal covers them (``statements.py``). A round is committed by one SQLite transaction after every blob
that it names is on disk: it is in the ledger whole, or not at all.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedserver import ledger_database
from fedserver.blobs import BlobError, Blobs
from fedserver.entry import GENESIS_PREVIOUS, Entry, canonical, entry_hash
from fedserver.ledger_database import DATABASE

if TYPE_CHECKING:
    from fedserver.sealing import Sealer

__all__ = [
    "BLOBS",
    "GENESIS_PREVIOUS",
    "KEYS",
    "LOCK",
    "Arrival",
    "Entry",
    "Ledger",
    "LedgerError",
    "LedgerHeldError",
]

BLOBS, KEYS, LOCK = "blobs", "keys", "ledger.lock"
ROUNDS_TO_CLEAN = 8
COLUMNS = "height, kind, round, content, previous, hash, wall, signatures, seal"
REMEDY = "free some space and continue with --resume"


class LedgerError(Exception):
    """The ledger cannot be used as asked; the message says what is wrong and what to do."""


class LedgerHeldError(LedgerError):
    """Another process writes the ledger."""


@dataclass(frozen=True)
class Arrival:
    """An admitted reply of the open round. ``plan``: digest of what was asked; seconds as measured."""

    nonce: str
    round: int
    node: str
    plan: str
    blob: str
    signature: dict[str, str] | None
    seconds: float


class Ledger:
    """The ledger of one run directory: ``ledger.db``, ``checkpoint.json`` and ``blobs/``."""

    def __init__(
        self,
        folder: Path,
        *,
        create: bool = False,
        write: bool = False,
        key_file: Path | None = None,
    ) -> None:
        """Open a ledger. Only one process at a time may ``create`` or ``write``; any may read.

        ``key_file``: the server's private key, by default one in the run folder.
        """
        self.folder = folder
        self.blobs = Blobs(folder / BLOBS)
        self._lock: IO[str] | None = None
        self._sealer: Sealer | None = None
        path = folder / DATABASE
        if not create and not path.is_file():
            raise LedgerError(f"{folder} holds no ledger; give the folder of a run (runs/NAME)")
        if create:
            self.blobs.folder.mkdir(parents=True, exist_ok=True)
        if create or write:
            self._lock = _locked(folder)
        try:
            if create and not path.is_file():
                _make(path)
            self._database = ledger_database.connect(path)
            if self._lock is None:
                ledger_database.require_current(self._database)
            else:
                self._sealer = self._begin_writing(key_file)
        except (sqlite3.DatabaseError, ledger_database.VersionError) as error:
            self.close()
            raise LedgerError(f"{path} cannot be read as a ledger: {error}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the database and let others write; the run directory may then be moved."""
        if hasattr(self, "_database"):
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

    def entries(self, kind: str | None = None, start: int = 0) -> Iterator[Entry]:
        """All entries in order, or those of one kind, from a height on."""
        where = "WHERE height >= ?2 AND (?1 IS NULL OR kind = ?1) ORDER BY height"
        yield from self._entries(where, kind, start)

    def last(self, kind: str) -> Entry | None:
        """The newest entry of a kind."""
        return next(self._entries("WHERE kind = ? ORDER BY height DESC LIMIT 1", kind), None)

    def round(self, number: int) -> Entry | None:
        """The newest entry of that round, None if it is not committed."""
        which = "WHERE kind = 'round' AND round = ? ORDER BY height DESC LIMIT 1"
        return next(self._entries(which, number), None)

    def append(
        self,
        kind: str,
        round_number: int,
        content: dict[str, Any],
        wall: dict[str, Any],
        signatures: Mapping[str, dict[str, str]] | None = None,
    ) -> Entry:
        """Commit one entry durably, and with it the open round. Its blobs must have been put before."""
        if self._sealer is None:
            raise LedgerError(f"{self.folder}: the ledger was opened for reading")
        text, wall_text = canonical(content), canonical(wall)
        signed = dict(signatures or {})
        try:
            self._database.execute("BEGIN IMMEDIATE")
            height, previous = self.height, self.head
            if previous != self._sealer.head:
                raise sqlite3.IntegrityError("another process appended to it")
            digest = entry_hash(height, kind, round_number, text, previous)
            seal = self._sealer.seal(
                height, kind, round_number, digest, wall_text, canonical(signed)
            )
            row = (height, kind, round_number, text, previous, digest, wall_text)
            self._database.execute(
                f"INSERT INTO entries ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, canonical(signed), seal),
            )
            self._database.execute("DELETE FROM arrivals")
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            raise LedgerError(
                f"{self.folder}: the {kind} entry could not be written: {error}; {REMEDY}"
            ) from None
        self._sealer.follow(digest, seal)
        self._write_checkpoint(self._sealer)
        return Entry(height, kind, round_number, content, previous, digest, wall, signed, seal)

    def arrive(self, arrival: Arrival) -> None:
        """Make an admitted reply of the open round durable. Its blob must have been put before."""
        row = {**vars(arrival), "signature": canonical(arrival.signature)}
        try:
            self._database.execute(
                "INSERT OR REPLACE INTO arrivals VALUES"
                " (:nonce, :round, :node, :plan, :blob, :signature, :seconds)",
                row,
            )
        except sqlite3.Error as error:
            self._roll_back()
            raise LedgerError(
                f"{self.folder}: {arrival.node}'s reply could not be written: {error}; {REMEDY}"
            ) from None

    def arrivals(self) -> dict[str, Arrival]:
        """The replies of the open round that are already here, by nonce."""
        found = {}
        for nonce, number, node, plan, blob, signature, seconds in self._read(
            "SELECT nonce, round, node, plan, blob, signature, seconds FROM arrivals"
        ):
            try:
                signed = json.loads(signature)
            except ValueError:
                continue  # Damaged: the node is asked again.
            found[nonce] = Arrival(nonce, number, node, plan, blob, signed, seconds)
        return found

    def put(self, data: bytes) -> str:
        """Store bytes durably under their SHA-256; storing them again is free."""
        try:
            return self.blobs.put(data)
        except BlobError as error:
            raise LedgerError(f"{self.folder}: {error}; {REMEDY}") from None

    def get(self, digest: str) -> bytes:
        """The bytes of a blob, checked against their digest."""
        try:
            return self.blobs.get(digest)
        except BlobError as error:
            raise LedgerError(str(error)) from None

    def forget(self, digest: str) -> None:
        """Delete a blob that is damaged, so that ``put`` can store it again."""
        self.blobs.forget(digest)

    def has(self, digest: str) -> bool:
        """Whether a blob is on disk."""
        return self.blobs.has(digest)

    def keep_states(self, wanted: set[str]) -> None:
        """Delete state blobs that later rounds made superfluous, and crashed writers' leftovers.

        A state follows from the updates before it, so only the newest ones are kept. Every round
        cleans up, so that only the last few can have left something.
        """
        newest = self._entries("WHERE kind = 'round' ORDER BY height DESC LIMIT ?", ROUNDS_TO_CLEAN)
        for digest in {entry.content["state"] for entry in newest} - wanted:
            self.blobs.forget(digest)
        self.blobs.clean()

    def verify(
        self, *, state: bool = True, key: str | None = None, only: int | None = None
    ) -> list[str]:
        """Problems of chain, seals, checkpoint, signatures and blobs; empty when all is sound.

        ``key``: the server's public key, where it is known from elsewhere. Of the states only the last
        is needed, and it can be made again (``state`` False: ignore it). ``only``: the round whose
        updates are read; those of the others are left alone.
        """
        from fedserver.verification import walk

        columns = ", ".join(
            f"CAST({name} AS BLOB)"
            for name in ("kind", "content", "previous", "hash", "wall", "signatures", "seal")
        )
        query = f"SELECT height, round, {columns} FROM entries ORDER BY height"
        try:
            return walk(
                self.folder,
                lambda: self._read(query),
                self.blobs,
                state=state,
                key=key,
                only=only,
            )
        except LedgerError as error:
            return [str(error)]

    def backup(self, target: Path) -> None:
        """A copy of the database as it is now, while others write. Raises sqlite3.Error."""
        copy = sqlite3.connect(target, isolation_level=None)
        try:
            self._database.backup(copy)
        finally:
            copy.close()

    def _begin_writing(self, key_file: Path | None) -> Sealer:
        from aggregators.keys import KeyFileError
        from fedserver.sealing import Sealer

        for leftover in self.folder.glob("*.part*"):
            leftover.unlink(missing_ok=True)
        unsealed = ledger_database.version(self._database) < 2
        fresh = unsealed or self.height == 0
        try:
            sealer = Sealer(self.folder, key_file, fresh=fresh)
        except KeyFileError as error:
            raise LedgerError(f"{self.folder}: {error}") from None
        if unsealed:
            ledger_database.migrate(self._database, sealer)
        else:
            ledger_database.require_current(self._database)
            found = self._read("SELECT hash, seal FROM entries ORDER BY height")
            if problem := sealer.resume(found):
                raise LedgerError(
                    f"{self.folder}: {problem}; restore the folder from a copy, or give the key that"
                    " seals it"
                )
        self._write_checkpoint(sealer)
        return sealer

    def _write_checkpoint(self, sealer: Sealer) -> None:
        try:
            sealer.write_checkpoint()
        except OSError as error:
            raise LedgerError(
                f"{self.folder}: the checkpoint could not be written: {error.strerror}; {REMEDY}"
            ) from None

    def _entries(self, which: str, *values: Any) -> Iterator[Entry]:
        for *fixed, content, previous, digest, wall, signatures, seal in self._read(
            f"SELECT {COLUMNS} FROM entries {which}", *values
        ):
            height, kind, number = fixed
            try:
                content, wall, signed = map(json.loads, (content, wall, signatures))
            except ValueError:
                raise LedgerError(
                    f"{self.folder}: entry {height} is not JSON: the ledger was changed; restore"
                    " it from a copy"
                ) from None
            yield Entry(height, kind, number, content, previous, digest, wall, signed, seal)

    def _read(self, query: str, *values: Any) -> list[Any]:
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"{self.folder / DATABASE} cannot be read: {error}; restore it from a copy"
            ) from None

    def _roll_back(self) -> None:
        if self._database.in_transaction:
            self._database.rollback()


def _make(path: Path) -> None:
    try:
        ledger_database.create(path)
    except (sqlite3.Error, OSError) as error:
        raise LedgerError(f"{path} could not be made: {error}; {REMEDY}") from None


def _locked(folder: Path) -> IO[str]:
    """An advisory lock on the folder, which ends with the process, however it ends."""
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise LedgerHeldError(
            f"{folder}: another process is running this run; wait for its end, or stop it"
        ) from None
    return file
