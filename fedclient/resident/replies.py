"""The last replies, on disk: a question that was answered is answered again with the same bytes.

The process that asks may be killed after the work is done; asked once more, the node must neither train
again nor send other bytes.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedclient.resident import frames
from fedclient.resident.frames import Frame, FrameError

SUFFIX = ".reply"
KEPT = 4


class Replies:
    """A folder with one file a reply, named by the question."""

    def __init__(self, folder: Path, kept: int = KEPT) -> None:
        """Make the folder, and clear what a killed writer left."""
        self._folder = folder
        self._kept = kept
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.part"):
            left.unlink(missing_ok=True)

    def get(self, question: str) -> Frame | None:
        """The reply to a question, None if it was never answered or is forgotten."""
        try:
            return frames.from_bytes(self._path(question).read_bytes())
        except (OSError, FrameError):
            return None

    def put(self, question: str, reply: Frame) -> None:
        """Write a reply durably, then forget the oldest ones."""
        path = self._path(question)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(frames.to_bytes(reply))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        synchronise(self._folder)
        newest_last = sorted(self._folder.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime_ns)
        for old in newest_last[: -self._kept]:
            old.unlink(missing_ok=True)

    def _path(self, question: str) -> Path:
        return self._folder / f"{question}{SUFFIX}"


def synchronise(folder: Path) -> None:
    """Make a rename in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
