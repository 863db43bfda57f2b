"""Backup and restore of a run folder: one tar file, taken while the run goes on, checked on its return.

What is in it fits together: the small files are read first, the database's snapshot after them, and
then the blobs that the snapshot names. Blobs never change, and updates are never deleted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sqlite3
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedserver.blobs import BlobError
from fedserver.checkpoint import FILE as CHECKPOINT
from fedserver.ledger import KEYS, Ledger, LedgerError
from fedserver.ledger_database import DATABASE

SCHEMA = 1
MANIFEST = "manifest.json"
SMALL_FILES = (CHECKPOINT, "scenario.toml", "metrics.jsonl", "summary.json")
MEMBER = re.compile(
    rf"({re.escape(DATABASE)}|{'|'.join(map(re.escape, (MANIFEST, *SMALL_FILES)))}"
    rf"|blobs/[0-9a-f]{{2}}/[0-9a-f]{{64}}\.safetensors|{KEYS}/([\w-]+/)?[\w-]+\.pem)"
)


@dataclass(frozen=True)
class Backup:
    """What a backup holds. ``keys``: whether private keys are among it."""

    entries: int
    head: str
    blobs: int
    keys: bool


def back_up(folder: Path, target: Path, *, keys: bool = False) -> Backup:
    """Write a run folder as it is now to one file, whole or not at all. Raises LedgerError, OSError.

    ``keys``: with the private keys in the folder; without them nobody can go on with the copy as the
    same server.
    """
    ledger = Ledger(folder)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch, part.open("wb") as file:
            # Whoever has the keys can speak for the server.
            os.chmod(part, 0o600 if keys else 0o644)
            with tarfile.open(fileobj=file, mode="w") as archive:
                found = _write(archive, ledger, Path(scratch) / DATABASE, keys)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except sqlite3.Error as error:
        raise LedgerError(f"{folder}: the ledger could not be copied: {error}") from None
    finally:
        part.unlink(missing_ok=True)
        ledger.close()
    return found


def restore(source: Path, folder: Path, *, key: str | None = None) -> Backup:
    """Make a run folder from a backup, once all of it is known to be sound. Raises LedgerError, OSError.

    ``key``: the server's public key, where it is known from elsewhere.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LedgerError(f"{folder} is not empty; restore into a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "run"
        made.mkdir()
        try:
            found = _read(source, made)
        except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError) as error:
            raise LedgerError(f"{source} is not a whole backup: {error}") from None
        ledger = Ledger(made)
        # The last state may have been replaced during the backup; it follows from the updates.
        problems = ledger.verify(state=False, key=key)
        entries, head = ledger.height, ledger.head
        ledger.close()
        if (entries, head) != (found.entries, found.head):
            problems.append("its ledger is not the one that its manifest names")
        if problems:
            raise LedgerError(f"{source} is not restored:\n" + "\n".join(problems))
        for name in (f"{DATABASE}-wal", f"{DATABASE}-shm"):
            (made / name).unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()
        made.replace(folder)
    return found


def _write(archive: tarfile.TarFile, ledger: Ledger, snapshot: Path, keys: bool) -> Backup:
    digests: dict[str, str] = {}

    def add(name: str, data: bytes, mode: int = 0o644) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), mode
        archive.addfile(member, io.BytesIO(data))
        digests[name] = hashlib.sha256(data).hexdigest()

    for name in SMALL_FILES:
        path = ledger.folder / name
        if path.is_file():
            add(name, path.read_bytes())
    ledger.backup(snapshot)
    add(DATABASE, snapshot.read_bytes())
    private = sorted((ledger.folder / KEYS).rglob("*.pem")) if keys else []
    for path in private:
        add(path.relative_to(ledger.folder).as_posix(), path.read_bytes(), 0o600)
    needed, states, entries, head = _named(snapshot)
    for digest in [*needed, *states]:
        try:
            data = ledger.blobs.get(digest)
        except BlobError as error:
            if digest in states:
                continue  # The run has gone on since, and made it superfluous.
            raise LedgerError(
                f"{ledger.folder}: {error}; 'fedbraid ledger verify' says more"
            ) from None
        add(ledger.blobs.path(digest).relative_to(ledger.folder).as_posix(), data)
    blobs = sum(name.startswith("blobs/") for name in digests)
    found = Backup(entries, head, blobs, bool(private))
    add(MANIFEST, json.dumps({"schema": SCHEMA, **vars(found), "files": dict(digests)}).encode())
    return found


def _named(snapshot: Path) -> tuple[list[str], list[str], int, str]:
    """The blobs that a snapshot's entries and open round need; its last state; entries and head."""
    database = sqlite3.connect(snapshot)
    try:
        rows = database.execute(
            "SELECT kind, content, hash FROM entries ORDER BY height"
        ).fetchall()
        needed = {blob: None for (blob,) in database.execute("SELECT blob FROM arrivals")}
    finally:
        database.close()
    state: list[str] = []
    for kind, content, _ in rows:
        told = json.loads(content)
        needed |= {node["update"]: None for node in told.get("nodes", ()) if node.get("update")}
        if told.get("layout_blob"):
            needed[told["layout_blob"]] = None
        if kind == "round":
            state = [told["state"]]
    return list(needed), state, len(rows), rows[-1][2] if rows else ""


def _read(source: Path, folder: Path) -> Backup:
    digests: dict[str, str] = {}
    manifest: dict[str, object] = {}
    with tarfile.open(source, mode="r:") as archive:
        for member in archive:
            if not member.isfile() or not MEMBER.fullmatch(member.name):
                raise ValueError(f"{member.name[:99]!r} has no place in one")
            content = archive.extractfile(member)
            assert content is not None
            data = content.read()
            if member.name == MANIFEST:
                manifest = json.loads(data)
                continue
            digests[member.name] = hashlib.sha256(data).hexdigest()
            path = folder / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = 0o600 if member.name.startswith(f"{KEYS}/") else 0o644
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    if not manifest:
        raise ValueError("it ends before its manifest")
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"its schema is {manifest['schema']!r}, not {SCHEMA}")
    if manifest["files"] != digests:
        raise ValueError("its files are not those that its manifest names")
    return Backup(
        int(str(manifest["entries"])), str(manifest["head"]), int(str(manifest["blobs"])),
        bool(manifest["keys"]),
    )  # fmt: skip
