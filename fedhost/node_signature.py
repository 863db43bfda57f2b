"""The signed headers by which a node proves who it is: Flower's, so that one check serves both.

Flower's nodes sign the time with their EC key (ECDSA, SHA-256). The signature does not cover the body,
so whoever saw a request could send another with its headers while the time is fresh; the front door
therefore takes each signed time of a key once (``fedserver/deployment/registry.py``).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER

from fedhost.enrolment import EnrolmentRefused

# Flower's own window: what is older is refused by it as well.
OLDEST_SECONDS = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
EARLIEST_SECONDS = SYSTEM_TIME_TOLERANCE


@dataclass(frozen=True)
class Signed:
    """Who signed (public key, PEM) and when: the text that was signed, and its seconds since 1970."""

    key: str
    text: str
    seconds: float


def public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half of a node's transport key, as Flower registers it."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


def signed_headers(key: ec.EllipticCurvePrivateKey, now: datetime) -> dict[str, str]:
    """The headers of one request."""
    text = now.astimezone(UTC).isoformat()
    signature = key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public_pem(key).encode()).decode(),
        TIMESTAMP_HEADER: text,
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signature).decode(),
    }


def read_signed(headers: Mapping[str, str], now: float) -> Signed:
    """Check a request's headers. Raises EnrolmentRefused: bad-signature or stale."""
    try:
        pem = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = base64.b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        text = headers[TIMESTAMP_HEADER]
        seconds = datetime.fromisoformat(text).timestamp()
        verify(pem.decode("ascii"), text.encode(), signature)
    except (KeyError, ValueError, OverflowError, binascii.Error):
        raise EnrolmentRefused("bad-signature", "the request is not signed by a node") from None
    if not -EARLIEST_SECONDS < now - seconds < OLDEST_SECONDS:
        raise EnrolmentRefused(
            "stale", f"the device's clock is {seconds - now:+.0f} s from the server's: set it right"
        )
    return Signed(pem.decode("ascii"), text, seconds)


def verify(pem: str, statement: bytes, signature: bytes) -> None:
    """Check an EC signature. Raises EnrolmentRefused (bad-signature)."""
    try:
        key = serialization.load_pem_public_key(pem.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError
        key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        raise EnrolmentRefused("bad-signature", "the signature is not of that key") from None
