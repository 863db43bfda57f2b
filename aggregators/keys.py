"""Ed25519 keys of nodes and of the server: made where they are used, kept in one file, never sent.

What is signed is never bare bytes but DSSE's pre-authentication encoding of a type and a payload, so
that a signature over one kind of message can never stand for another
(https://github.com/secure-systems-lab/dsse/blob/master/protocol.md).
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

PUBLIC_BYTES, SIGNATURE_BYTES = 32, 64
FILE_LIMIT = 1 << 16  # bytes; a key takes 119
OTHERS = stat.S_IRWXG | stat.S_IRWXO


class KeyFileError(Exception):
    """A key file that cannot be used; the message says why and what to do."""


def load_or_create(path: Path) -> Ed25519PrivateKey:
    """The private key in ``path`` (PKCS #8, PEM), made there if there is none.

    A new file is whole or absent, readable by its owner alone, and never replaces another: of two
    processes that make it at once, both return the same key. Raises KeyFileError.
    """
    path = path.expanduser()
    if not path.exists():
        try:
            _write_new(path)
        except OSError as error:
            raise KeyFileError(f"no key could be made in {path}: {error.strerror}") from None
    return load(path)


def load(path: Path) -> Ed25519PrivateKey:
    """The private key in ``path``. Raises KeyFileError."""
    try:
        with path.open("rb") as file:
            readers = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & OTHERS
            content = file.read(FILE_LIMIT)
    except OSError as error:
        raise KeyFileError(f"the key in {path} cannot be read: {error.strerror}") from None
    if readers:
        raise KeyFileError(f"others may read the key in {path}: chmod 600 {path}")
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(
            f"{path} holds no Ed25519 key in PEM form; restore it from a copy, or move it away and"
            " let a new one be made and enrolled"
        )
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half, as 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def sign(key: Ed25519PrivateKey, data: bytes) -> bytes:
    """The 64-byte signature of ``data`` (RFC 8032); equal data has equal signatures."""
    return key.sign(data)


def verify(public: str, data: bytes, signature: bytes) -> bool:
    """Whether ``signature`` over ``data`` was made with the private half of ``public`` (hexadecimal)."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, data)
    except (ValueError, InvalidSignature):
        return False
    return True


def authenticated(payload_type: str, payload: bytes) -> bytes:
    """What is signed for a payload: DSSE's pre-authentication encoding of its type and its bytes."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _write_new(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    part = Path(name)  # mode 0600 from its first moment
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)
        except FileExistsError:
            return  # Another process was first, and its key is the one.
        except OSError:
            part.replace(path)  # A file system without links, as memory cards have.
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
