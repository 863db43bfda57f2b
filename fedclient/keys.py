"""A device's own key: made on the device, kept in one private file, and never sent anywhere."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedhost.private_files import make_private_folder, write_private


class KeyFileError(Exception):
    """A key file that cannot be used, and what to do."""


def load_or_create(path: Path) -> Ed25519PrivateKey:
    """The private key in ``path`` (PKCS #8, PEM), made there if there is none. Raises KeyFileError."""
    if not path.exists():
        made = Ed25519PrivateKey.generate()
        make_private_folder(path.parent)
        write_private(path, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(
            f"{path} holds no Ed25519 key: restore it, or move it away and join anew"
        )
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half, as 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def sign(key: Ed25519PrivateKey, data: bytes) -> bytes:
    """The 64-byte signature of ``data`` (RFC 8032)."""
    return key.sign(data)
