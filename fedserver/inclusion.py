"""Proof that a node's update is in a ledger: checked with the server's public key and nothing else.

The proof holds the entry, its path in the Merkle tree, and the server's checkpoint over the tree's root.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedserver.checkpoint import read_checkpoint
from fedserver.entry import canonical, entry_hash
from fedserver.ledger import Ledger, LedgerError
from fedserver.merkle import inclusion_path, root_of_path
from fedserver.statements import CHECKPOINT, SealError, open_seal

SCHEMA = 1
LARGEST_PROOF = 64 << 20  # bytes


class ProofError(Exception):
    """A proof that proves nothing; the message says why."""


@dataclass(frozen=True)
class Proven:
    """What a proof proves: this reply, by its SHA-256, got this verdict in this entry of a ledger."""

    node: str
    round: int
    verdict: str
    update: str
    height: int
    entries: int
    head: str


def prove(ledger: Ledger, node: str, round_number: int) -> str:
    """The proof, as JSON, for one node's reply of one round. Raises LedgerError."""
    entries = list(ledger.entries())
    for entry in entries:
        if entry.kind != "round" or entry.round != round_number:
            continue
        if any(_is(row, node, round_number) for row in entry.content["nodes"]):
            break
    else:
        raise LedgerError(f"{ledger.folder}: no round {round_number} with a node {node!r}")
    checkpoint = read_checkpoint(ledger.folder)
    try:
        size = int(open_seal(checkpoint).predicate["entries"])
    except (SealError, KeyError, ValueError):
        raise LedgerError(f"{ledger.folder}: the checkpoint cannot be read") from None
    if size <= entry.height:
        raise LedgerError(
            f"{ledger.folder}: the checkpoint is behind; --resume brings it up to date"
        )
    leaves = [bytes.fromhex(one.hash) for one in entries[:size]]
    return canonical(
        {
            "schema": SCHEMA,
            "node": node,
            "round": round_number,
            "entry": [
                entry.height, entry.kind, entry.round, canonical(entry.content), entry.previous,
            ],
            "path": [step.hex() for step in inclusion_path(leaves, entry.height)],
            "checkpoint": checkpoint,
        }
    )  # fmt: skip


def check(proof: bytes, key: str) -> Proven:
    """What a proof proves, by the server's public key (hexadecimal). Raises ProofError."""
    try:
        found: dict[str, Any] = json.loads(proof)
        if found["schema"] != SCHEMA:
            raise ProofError(f"its schema {found['schema']!r} is not {SCHEMA}")
        height, kind, number, content, previous = found["entry"]
        digest = entry_hash(height, kind, number, content, previous)
        path = [bytes.fromhex(step) for step in found["path"]]
        checkpoint = open_seal(found["checkpoint"])
        if checkpoint.key != key or checkpoint.predicate_type != CHECKPOINT:
            raise ProofError(f"its checkpoint is not one by the key {key[:16]}")
        size = int(checkpoint.predicate["entries"])
        root = root_of_path(bytes.fromhex(digest), height, size, path)
        if root is None or root.hex() != checkpoint.predicate["merkle_root"]:
            raise ProofError("its entry is not in the tree that the server signed")
        rows = [
            row for row in json.loads(content)["nodes"] if _is(row, found["node"], found["round"])
        ]
        if kind != "round" or number != found["round"] or not rows:
            raise ProofError(f"the entry has no reply of {found['node']!r}")
        first = rows[0]
        return Proven(
            str(first["node"]), number, str(first["verdict"]), str(first["update"] or ""),
            height, size, checkpoint.subject,
        )  # fmt: skip
    except SealError as error:
        raise ProofError(f"its checkpoint does not hold: {error}") from None
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise ProofError("it is no proof that 'fedbraid ledger prove' wrote") from None


def read_proof(path: Path) -> bytes:
    """A proof's bytes. Raises ProofError."""
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_PROOF)
    except OSError as error:
        raise ProofError(f"{path}: {error.strerror}") from None


def _is(row: dict[str, Any], node: str, round_number: int) -> bool:
    """Whether a row is of this node's first answer to this round, and not of a late one to another."""
    return bool(row["node"] == node and row["round"] == round_number)
