"""What the server signs: one in-toto statement an entry of the ledger, in a DSSE envelope.

A statement names an entry by its hash and says what the hash leaves out: digests of the wall record
and of the nodes' signatures, the seal before it, and the Merkle root of all entries so far. What it
says follows from the entry, so a seal adds one signature and no freedom: every byte of it is checked.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregators.keys import authenticated, public_hex, sign, verify

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
ENTRY = "urn:fedbraid:ledger-entry:1"
CHECKPOINT = "urn:fedbraid:ledger-checkpoint:1"


class SealError(ValueError):
    """A seal that is not one; the message says why."""


@dataclass(frozen=True)
class Seal:
    """An opened seal: the key that made it (hexadecimal), and its statement."""

    key: str
    predicate_type: str
    subject: str
    predicate: dict[str, Any]


def text_digest(text: str) -> str:
    """SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def entry_statement(
    *,
    height: int,
    kind: str,
    round_number: int,
    entry: str,
    wall: str,
    signatures: str,
    previous_seal: str,
    root: bytes,
) -> bytes:
    """The statement of one entry. ``entry``: its hash; the next three: texts as they are stored.

    ``root``: of the tree over all entries up to and with this one.
    """
    predicate = {
        "height": height,
        "kind": kind,
        "round": round_number,
        "wall": text_digest(wall),
        "signatures": text_digest(signatures),
        "previous_seal": text_digest(previous_seal) if previous_seal else "",
        "merkle_root": root.hex(),
    }
    return _statement(ENTRY, f"entry/{height}", entry, predicate)


def checkpoint_statement(*, entries: int, head: str, last_seal: str, root: bytes) -> bytes:
    """The statement of where a ledger stands: how many entries, the last one and its seal, the root."""
    predicate = {
        "entries": entries,
        "last_seal": text_digest(last_seal) if last_seal else "",
        "merkle_root": root.hex(),
    }
    return _statement(CHECKPOINT, "head", head, predicate)


def seal(statement: bytes, key: Ed25519PrivateKey) -> str:
    """A statement in its DSSE envelope, as canonical JSON."""
    signature = sign(key, authenticated(PAYLOAD_TYPE, statement))
    return _envelope(statement, public_hex(key), signature)


def problem_of(text: str, statement: bytes, key: str) -> str:
    """Why ``text`` is not the seal of ``statement`` by ``key``, in a few words; "" where it is."""
    try:
        signature = base64.b64decode(json.loads(text)["signatures"][0]["sig"], validate=True)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return "has no readable seal"
    if _envelope(statement, key, signature) != text:
        return "is not what its seal says"
    if not verify(key, authenticated(PAYLOAD_TYPE, statement), signature):
        return "has a seal that the server's key did not make"
    return ""


def open_seal(text: str) -> Seal:
    """What a seal says and who says so, the signature checked. Raises SealError."""
    try:
        envelope = json.loads(text)
        payload = base64.b64decode(envelope["payload"], validate=True)
        key = str(envelope["signatures"][0]["keyid"])
        found = json.loads(payload)
        opened = Seal(
            key,
            str(found["predicateType"]),
            str(found["subject"][0]["digest"]["sha256"]),
            dict(found["predicate"]),
        )
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise SealError("it cannot be read") from None
    if problem_of(text, payload, key):
        raise SealError("its signature is not its key's")
    return opened


def _statement(kind: str, name: str, digest: str, predicate: dict[str, Any]) -> bytes:
    return _canonical(
        {
            "_type": STATEMENT,
            "subject": [{"name": name, "digest": {"sha256": digest}}],
            "predicateType": kind,
            "predicate": predicate,
        }
    ).encode()


def _envelope(statement: bytes, key: str, signature: bytes) -> str:
    return _canonical(
        {
            "payloadType": PAYLOAD_TYPE,
            "payload": base64.b64encode(statement).decode(),
            "signatures": [{"keyid": key, "sig": base64.b64encode(signature).decode()}],
        }
    )


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
