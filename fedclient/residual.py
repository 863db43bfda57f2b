"""What a node's messages did not carry: kept between rounds, on the node's own disk.

A residual belongs to the history that it was made in, so it is filed under the name that the plan has
for that (``Plan.history``), never under a round's number: another run of the same scenario, a copy of it
or one that was rolled back finds its own, or none. A node that is asked the same again finds what it
found first, so that a resumed run is the run that was not interrupted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedclient.base_model import cache_folder
from fedclient.resident.replies import synchronise

FORGOTTEN_AFTER = 7 * 24 * 3600.0  # seconds without a round of the run
SUFFIX = ".safetensors"
# The last round's, and the one that it began from, should it be asked again, are always kept. What is
# older is for runs that another copy of their scenario overtook, as far as there is room.
ALWAYS, MOST, ROOM = 2, 32, 1 << 30


@dataclass(frozen=True)
class Residuals:
    """One node's residuals in one run, a file a round."""

    run: str
    node: str

    def find(self, names: Sequence[str]) -> tuple[dict[str, Tensor], str]:
        """What is filed under the first of ``names`` that there is, float32 by tensor name; that name.

        ({}, "") where there is none, or only a damaged one: then the node begins without.
        """
        for name in names:
            path = self._path(name)
            try:
                found = load_file(path)
            except (OSError, SafetensorError):
                continue
            with suppress(OSError):
                # What a run goes on from is as young as what it will leave.
                os.utime(path)
            return {tensor: left.float() for tensor, left in found.items()}, name
        return {}, ""

    def keep(self, name: str, residual: Mapping[str, Tensor]) -> None:
        """File what a round left, and forget what is too old.

        In bfloat16: a residual is a correction, and takes half the room of the weights.
        Raises OSError or SafetensorError where there is no room, or no right to write.
        """
        if not residual:
            return
        _forget_old_runs()
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob("*.part"):
            # Of a process that was killed while it wrote.
            left.unlink(missing_ok=True)
        path = self._path(name)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({n: t.to(torch.bfloat16).contiguous() for n, t in residual.items()}, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        synchronise(self._folder)
        self._make_room()

    @property
    def _folder(self) -> Path:
        # A node's name may be anything; its digest is a folder's name everywhere.
        return _root() / self.run / hashlib.sha256(self.node.encode()).hexdigest()[:16]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def _make_room(self) -> None:
        files = [(path, path.stat()) for path in self._folder.glob(f"*{SUFFIX}")]
        room = ROOM
        newest_first = sorted(files, key=lambda file: file[1].st_mtime_ns, reverse=True)
        for place, (path, found) in enumerate(newest_first):
            if place < ALWAYS:
                continue
            room -= found.st_size
            if place >= MOST or room < 0:
                path.unlink(missing_ok=True)


def _root() -> Path:
    return cache_folder() / "residuals"


def _forget_old_runs() -> None:
    if not _root().is_dir():
        return
    for folder in _root().iterdir():
        newest = max((p.stat().st_mtime for p in folder.rglob("*")), default=0.0)
        if time.time() - newest > FORGOTTEN_AFTER:
            shutil.rmtree(folder, ignore_errors=True)
