"""One link of the ledger's chain, and what its hash covers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

GENESIS_PREVIOUS = "0" * 64


@dataclass(frozen=True)
class Entry:
    """``hash`` covers neither ``wall`` (seconds, timestamps) nor ``signatures``; the seal covers all.

    ``signatures``: by the digest of a signed reply, its node's key and signature.
    """

    height: int
    kind: str
    round: int
    content: dict[str, Any]
    previous: str
    hash: str
    wall: dict[str, Any]
    signatures: dict[str, dict[str, str]]
    seal: str


def canonical(content: Any) -> str:
    """JSON with sorted keys and no spaces; NaN and infinities are refused."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def entry_hash(height: int, kind: str, round_number: int, content: str, previous: str) -> str:
    """SHA-256 over the canonical form of an entry and its predecessor's hash."""
    text = canonical([height, kind, round_number, content, previous])
    return hashlib.sha256(text.encode()).hexdigest()
