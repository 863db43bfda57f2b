"""The SQLite file of a ledger: its schema, its versions, and how one version becomes the next.

A new file is made beside its place and moved there, so that a ledger that exists has its tables.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedserver.sealing import Sealer

DATABASE = "ledger.db"
SCHEMA_VERSION = 2

_ENTRIES = """
CREATE TABLE entries (
    height     INTEGER PRIMARY KEY,
    kind       TEXT NOT NULL,
    round      INTEGER NOT NULL,
    content    TEXT NOT NULL,
    previous   TEXT NOT NULL,
    hash       TEXT NOT NULL UNIQUE,
    wall       TEXT NOT NULL,
    signatures TEXT NOT NULL DEFAULT '{}',
    seal       TEXT NOT NULL DEFAULT ''
) STRICT
"""
# Replies of the round that is not committed yet. The entry that commits it empties the table.
_ARRIVALS = """
CREATE TABLE arrivals (
    nonce     TEXT PRIMARY KEY,
    round     INTEGER NOT NULL,
    node      TEXT NOT NULL,
    plan      TEXT NOT NULL,
    blob      TEXT NOT NULL,
    signature TEXT NOT NULL,
    seconds   REAL NOT NULL
) STRICT
"""


class VersionError(Exception):
    """A database that this version cannot read as it is; the message says what to do."""


def create(path: Path) -> None:
    """Make an empty database at ``path``. Raises sqlite3.Error and OSError."""
    part = path.with_suffix(f".{os.getpid()}.part")
    for leftover in path.parent.glob("*.part*"):
        leftover.unlink(missing_ok=True)
    database = sqlite3.connect(part, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        for statement in (_ENTRIES, _ARRIVALS, f"PRAGMA user_version = {SCHEMA_VERSION}"):
            database.execute(statement)
    finally:
        database.close()  # which also moves what is in the log into the file
    part.replace(path)


def connect(path: Path) -> sqlite3.Connection:
    """Open a database that exists. Raises sqlite3.Error where it is none."""
    database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA synchronous=FULL")
        version(database)
    except sqlite3.Error:
        database.close()
        raise
    return database


def version(database: sqlite3.Connection) -> int:
    """The version of a database's schema; 1 is that of ledgers without seals."""
    return int(database.execute("PRAGMA user_version").fetchone()[0]) or 1


def require_current(database: sqlite3.Connection) -> None:
    """Refuse a database of another version. Raises VersionError."""
    found = version(database)
    if found > SCHEMA_VERSION:
        raise VersionError(
            f"it has the format {found}, this fedbraid knows {SCHEMA_VERSION}: update fedbraid"
        )
    if found < SCHEMA_VERSION:
        raise VersionError(
            f"an earlier version wrote it (format {found}): 'fedbraid ledger migrate' brings it up to"
            " date, as --resume does"
        )


def migrate(database: sqlite3.Connection, sealer: Sealer) -> None:
    """Bring a database forward to the current version, in one transaction.

    Version 2 has seals, the nodes' signatures and the open round; older entries are sealed now. Raises
    sqlite3.Error, OSError, and VersionError for a version of the future.
    """
    if version(database) < 2:
        database.execute("BEGIN IMMEDIATE")
        try:
            database.execute("ALTER TABLE entries ADD COLUMN signatures TEXT NOT NULL DEFAULT '{}'")
            database.execute("ALTER TABLE entries ADD COLUMN seal TEXT NOT NULL DEFAULT ''")
            database.execute(_ARRIVALS)
            rows = database.execute(
                "SELECT height, kind, round, hash, wall, signatures FROM entries ORDER BY height"
            ).fetchall()
            for row in rows:
                seal = sealer.seal(*row)
                database.execute("UPDATE entries SET seal = ? WHERE height = ?", (seal, row[0]))
                sealer.follow(row[3], seal)
            # Before the entries are sealed for good: the other way round, a crash in between would
            # leave sealed entries that no checkpoint names.
            sealer.write_checkpoint()
            database.execute("PRAGMA user_version = 2")
            database.execute("COMMIT")
        except BaseException:
            database.rollback()
            raise
    require_current(database)
