"""Walking a ledger: chain, seals, checkpoint, nodes' signatures and blobs; nothing is believed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from aggregators import UpdateRejected
from aggregators.keys import KeyFileError, load, public_hex
from aggregators.messages import open_envelope
from aggregators.signatures import Signature, holds
from fedserver.blobs import BlobError, Blobs
from fedserver.checkpoint import checkpoint_problem, read_checkpoint
from fedserver.entry import GENESIS_PREVIOUS, entry_hash
from fedserver.merkle import GrowingTree
from fedserver.sealing import server_key_file
from fedserver.statements import SealError, entry_statement, open_seal, problem_of

Row = tuple[int, int, str, str, str, str, str, str, str]


def walk(
    folder: Path,
    read: Callable[[], Iterable[tuple[Any, ...]]],
    blobs: Blobs,
    *,
    state: bool,
    key: str | None,
    only: int | None = None,
) -> list[str]:
    """The problems of a ledger's rows, which ``read`` reads: height, round, and as bytes kind, content,
    previous, hash, wall, signatures and seal.

    ``key``: the server's public key as the caller knows it; otherwise that of the key file in the
    folder, and without one that of the first seal, which then proves only that one key made all.
    ``only``: the round whose updates and their nodes' signatures are checked; None: all.
    """
    problems: list[str] = []
    found: list[tuple[str, str]] = []
    newest: tuple[int, str] | None = None
    previous, last_seal = GENESIS_PREVIOUS, ""
    tree = GrowingTree()
    # A run may go on meanwhile: what names the ledger's end is read before the entries, not after.
    checkpoint, named_head = read_checkpoint(folder), _summarised_head(folder)
    for expected, raw in enumerate(read()):
        row = _decoded(raw)
        if row is None:
            problems.append(f"entry {expected}: it cannot be read")
            continue
        height, number, kind, content, before, digest, wall, signatures, seal = row
        key = key or _own_key(folder) or _key_of(seal)
        if height != expected:
            problems.append(f"height {expected} is missing")
        if before != previous:
            problems.append(f"entry {height}: does not follow the entry before it")
        if entry_hash(height, kind, number, content, before) != digest:
            problems.append(f"entry {height}: its content was changed")
        else:
            tree.append(bytes.fromhex(digest))
        statement = entry_statement(
            height=height,
            kind=kind,
            round_number=number,
            entry=digest,
            wall=wall,
            signatures=signatures,
            previous_seal=last_seal,
            root=tree.root(),
        )
        if problem := problem_of(seal, statement, key):
            problems.append(f"entry {height}: {problem}")
        previous, last_seal = digest, seal
        found.append((digest, seal))
        try:
            told = json.loads(content)
            signed = _signatures(signatures)
            updates = [node["update"] for node in told.get("nodes", ()) if node.get("update")]
            newest = (height, told["state"]) if kind == "round" else newest
            named = [*updates, *filter(None, [told.get("layout_blob")])]
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"entry {height}: its content cannot be read")
            continue
        if only is not None and updates and number != only:
            continue
        problems += [f"entry {height}: {p}" for p in _bad_blobs(blobs, named, signed)]
    if not found:
        problems.append("the ledger is empty")
    if state and newest is not None:
        remedy = "; --resume or export makes this state again from the updates"
        problems += [f"entry {newest[0]}: {p}{remedy}" for p in _bad_blobs(blobs, [newest[1]], {})]
    if key and (problem := checkpoint_problem(checkpoint, found, key)):
        problems.append(problem)
    if named_head and named_head not in {digest for digest, _ in found}:
        problems.append(
            f"summary.json names the head {named_head[:16]}, which is not in the ledger: entries are"
            " missing at its end"
        )
    return problems


def _decoded(raw: tuple[Any, ...]) -> Row | None:
    height, number, *texts = raw
    try:
        decoded = [text.decode() for text in texts]
        bytes.fromhex(decoded[3])
    except (UnicodeDecodeError, ValueError):
        return None
    kind, content, before, digest, wall, signatures, seal = decoded
    return height, number, kind, content, before, digest, wall, signatures, seal


def _own_key(folder: Path) -> str:
    path = server_key_file(folder)
    try:
        return public_hex(load(path)) if path.exists() else ""
    except KeyFileError:
        return ""


def _key_of(seal: str) -> str:
    try:
        return open_seal(seal).key
    except SealError:
        return "no key"


def _signatures(text: str) -> dict[str, Signature]:
    return {
        blob: Signature(str(one["key"]), str(one["signature"]))
        for blob, one in json.loads(text).items()
    }


def _bad_blobs(blobs: Blobs, digests: Iterable[str], signed: Mapping[str, Signature]) -> list[str]:
    problems = [
        f"a signature stands by {b[:12]}, which nobody sent" for b in signed if b not in digests
    ]
    for digest in digests:
        try:
            data = blobs.get(digest)
        except BlobError as error:
            problems.append(str(error))
            continue
        if digest in signed and not _holds(data, signed[digest]):
            problems.append(f"update {digest[:12]} is not what its node signed")
    return problems


def _holds(reply: bytes, signature: Signature) -> bool:
    try:
        return holds(open_envelope(reply), signature)
    except (UpdateRejected, ValueError):
        return False


def _summarised_head(folder: Path) -> str:
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found.get("head") or "") if isinstance(found, dict) else ""
