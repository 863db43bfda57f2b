"""Files that only their owner may read: keys, secrets, state; written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def make_private_folder(folder: Path) -> Path:
    """Make a folder, and those above it, and close it to everybody else (mode 0700)."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def write_private(path: Path, content: bytes | str) -> Path:
    """Write ``content`` with mode 0600: a reader sees the old file or the new one, whatever happens."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path
