"""Content-addressed files: what a ledger names by its SHA-256, durable before it is named."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SUFFIX = ".safetensors"


class BlobError(Exception):
    """Bytes that could not be stored or are not there; the message says which."""


class Blobs:
    """A folder of blobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, data: bytes) -> str:
        """Store bytes durably under their SHA-256; storing them again is free."""
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(digest)
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_durably(path, data)
            except OSError as error:
                raise BlobError(
                    f"{len(data)} bytes could not be stored: {error.strerror}"
                ) from None
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of a blob, checked against their digest."""
        try:
            data = self.path(digest).read_bytes()
        except OSError:
            raise BlobError(f"blob {digest} is missing from {self.folder}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise BlobError(f"blob {digest} was changed on disk")
        return data

    def has(self, digest: str) -> bool:
        """Whether a blob is on disk."""
        return self.path(digest).is_file()

    def forget(self, digest: str) -> None:
        """Delete a blob."""
        self.path(digest).unlink(missing_ok=True)

    def clean(self) -> None:
        """Delete what killed writers left behind."""
        for leftover in self.folder.glob("*/*.part"):
            leftover.unlink(missing_ok=True)

    def path(self, digest: str) -> Path:
        """Where a blob is, or would be."""
        return self.folder / digest[:2] / f"{digest}{SUFFIX}"


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file's content, whole or not at all; on return it is on disk. Raises OSError."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    # On Linux a rename is durable once the folder itself has reached the disk.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
