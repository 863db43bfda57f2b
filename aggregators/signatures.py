"""Signed replies: a node's Ed25519 signature over its envelope, in front of the reply's bytes.

The envelope names run, round, node, nonce, layout, base, report and the update's digest, so the
signature covers all that the server counts. It stands in front of the reply and not in it: the bytes
that are stored and hashed are those that an unsigned node would have sent, whatever its key.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregators.keys import (
    PUBLIC_BYTES,
    SIGNATURE_BYTES,
    authenticated,
    public_hex,
    sign,
    verify,
)
from aggregators.messages import Envelope, open_envelope
from aggregators.update import UpdateRejected, Verdict

# No reply begins like this: its first 8 bytes are the length of a header, and below 2**24.
MAGIC = b"fedbraid-signed\0"
ENVELOPE_TYPE = "application/vnd.fedbraid.envelope+json"


@dataclass(frozen=True)
class Signature:
    """Who signed and what came of it: 64 and 128 hexadecimal digits."""

    key: str
    signature: str


def sign_reply(reply: bytes, key: Ed25519PrivateKey) -> bytes:
    """A reply with its signature in front: 112 bytes more."""
    signature = sign(key, _signed(open_envelope(reply)))
    return join_signature(reply, Signature(public_hex(key), signature.hex()))


def join_signature(reply: bytes, signature: Signature | None) -> bytes:
    """What ``split_signature`` takes apart."""
    if signature is None:
        return reply
    return MAGIC + bytes.fromhex(signature.key) + bytes.fromhex(signature.signature) + reply


def split_signature(data: bytes) -> tuple[bytes, Signature | None]:
    """The reply itself, and the signature in front of it if there is one."""
    public, end = len(MAGIC) + PUBLIC_BYTES, len(MAGIC) + PUBLIC_BYTES + SIGNATURE_BYTES
    if not data.startswith(MAGIC) or len(data) < end:
        return data, None
    return data[end:], Signature(data[len(MAGIC) : public].hex(), data[public:end].hex())


def check_signature(envelope: Envelope, found: Signature | None, key: str) -> None:
    """Refuse an envelope that the holder of ``key`` (hexadecimal) did not sign."""
    if found is None:
        raise UpdateRejected(
            Verdict.UNSIGNED, f"the reply is not signed, and {envelope.node!r} has a key"
        )
    if found.key != key:
        raise UpdateRejected(
            Verdict.FOREIGN_KEY, f"signed with the key {found.key[:12]}, the node's is {key[:12]}"
        )
    if not holds(envelope, found):
        raise UpdateRejected(
            Verdict.FORGED, f"the signature is not the key {key[:12]}'s over this envelope"
        )


def holds(envelope: Envelope, found: Signature) -> bool:
    """Whether a signature is its key's over this envelope."""
    return verify(found.key, _signed(envelope), bytes.fromhex(found.signature))


def _signed(envelope: Envelope) -> bytes:
    return authenticated(ENVELOPE_TYPE, envelope.canonical())
