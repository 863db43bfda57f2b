"""What both sides of joining say: the token, the request and its answer, and the refusals.

The token carries a secret and the fingerprint of the authority that signed the server's certificate.
The secret never crosses a connection that was not checked against that fingerprint: to fetch the
authority's certificate a device shows ``locator``, from which the secret does not follow.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from pydantic import BaseModel, ConfigDict, Field

PREFIX = "fb1-"
SECRET_BYTES, FINGERPRINT_BYTES, CHECK_BYTES = 24, 32, 4

AUTHORITY_ROUTE = "/enrol/v1/authority"
JOIN_ROUTE = "/enrol/v1/join"
NODE_ROUTE = "/enrol/v1/node"
LEAVE_ROUTE = "/enrol/v1/leave"

RefusalKind = Literal[
    "malformed-token",
    "unknown-token",
    "used-token",
    "expired-token",
    "wrong-authority",
    "wrong-clock",
    "name-taken",
    "key-taken",
    "bad-request",
    "bad-signature",
    "replayed",
    "stale",
    "unknown-node",
    "revoked",
    "unreachable",
]


class EnrolmentRefused(Exception):
    """Why a device may not join, or a node not act. ``kind`` is for programs, the text for people."""

    def __init__(self, kind: RefusalKind, text: str) -> None:
        super().__init__(text)
        self.kind: RefusalKind = kind


@dataclass(frozen=True)
class Token:
    """A one-time invitation: 24 random bytes and the SHA-256 of the authority's certificate (DER)."""

    secret: bytes
    fingerprint: bytes

    @staticmethod
    def new(fingerprint: bytes) -> Token:
        """A token with a fresh secret."""
        return Token(secrets.token_bytes(SECRET_BYTES), fingerprint)

    def __str__(self) -> str:
        body = self.secret + self.fingerprint
        return PREFIX + base64.urlsafe_b64encode(body + _check(body)).decode().rstrip("=")

    @staticmethod
    def parse(text: str) -> Token:
        """Read a token; its last bytes are a checksum, so that a slip of copying is told as such."""
        refusal = EnrolmentRefused(
            "malformed-token", "this is not a whole token: copy all that 'server invite' printed"
        )
        if not text.startswith(PREFIX):
            raise refusal
        try:
            encoded = text.removeprefix(PREFIX)
            body = base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise refusal from None
        body, check = body[:-CHECK_BYTES], body[-CHECK_BYTES:]
        if len(body) != SECRET_BYTES + FINGERPRINT_BYTES or check != _check(body):
            raise refusal
        return Token(body[:SECRET_BYTES], body[SECRET_BYTES:])

    @property
    def locator(self) -> str:
        """Names the invitation without giving the secret away (hex)."""
        return hashlib.sha256(b"fedbraid locate\0" + self.secret).hexdigest()

    @property
    def verifier(self) -> str:
        """What the server keeps of the secret (hex)."""
        return verifier_of(self.secret)


def verifier_of(secret: bytes) -> str:
    """SHA-256 of a token's secret, in hex; 192 random bits need no slow hash."""
    return hashlib.sha256(b"fedbraid verify\0" + secret).hexdigest()


def fingerprint_of(certificate_pem: bytes) -> bytes:
    """SHA-256 of a certificate's DER form. Raises ValueError if it is not a certificate."""
    return x509.load_pem_x509_certificate(certificate_pem).fingerprint(hashes.SHA256())


class _Words(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JoinRequest(_Words):
    """What a device sends. Both signatures are over ``statement()``: it holds the private keys.

    ``transport_key``: PEM, on P-256, for Flower's node authentication. ``update_key``: Ed25519, 64
    hex digits, for signed updates.
    """

    secret: str = Field(pattern=r"^[0-9a-f]{48}$")
    transport_key: str = Field(max_length=1024)
    update_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    transport_signature: str = Field(pattern=r"^[0-9a-f]{16,512}$")
    update_signature: str = Field(pattern=r"^[0-9a-f]{128}$")

    def statement(self) -> bytes:
        """The bytes that both keys sign."""
        return join_statement(bytes.fromhex(self.secret), self.transport_key, self.update_key)


def join_statement(secret: bytes, transport_key: str, update_key: str) -> bytes:
    """What a joining device signs with both of its keys."""
    parts = (verifier_of(secret), transport_key, update_key)
    return b"fedbraid join\0" + b"\0".join(part.encode() for part in parts)


class JoinAnswer(_Words):
    """What the server answers. ``application``: SHA-256 of the app bundle (FAB) that it will send."""

    name: str
    node_id: int
    application: str = Field(pattern=r"^[0-9a-f]{64}$")


class NodeAnswer(_Words):
    """What the server knows of a node that asks."""

    name: str
    joined: float
    application: str


class RefusalAnswer(_Words):
    """A refusal on the wire."""

    kind: RefusalKind
    text: str


def _check(body: bytes) -> bytes:
    return hashlib.sha256(b"fedbraid token\0" + body).digest()[:CHECK_BYTES]
