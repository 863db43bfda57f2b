"""What a node's messages did not carry: kept between rounds, on the node's own disk.

A node that is killed and asked again finds what it had at the start of the round, so that a resumed run
is the run that was not interrupted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping
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


@dataclass(frozen=True)
class Residuals:
    """One node's residuals in one run, a file a round."""

    run: str
    node: str

    def before(self, round_number: int) -> dict[str, Tensor]:
        """What was left before a round: float32 by tensor name, {} in the first and after a loss."""
        files = self._files()
        if self._folder.is_dir():
            for left in self._folder.glob("*.part"):
                # Of a process that was killed while it wrote.
                left.unlink(missing_ok=True)
        # A later round's are of an earlier run of the same scenario, or of an interrupted try.
        for number in [n for n in files if n >= round_number]:
            files.pop(number).unlink(missing_ok=True)
        if not files:
            return {}
        try:
            found = load_file(files[max(files)])
        except (OSError, SafetensorError):
            return {}
        return {name: tensor.float() for name, tensor in found.items()}

    def keep(self, round_number: int, residual: Mapping[str, Tensor]) -> None:
        """Write what a round left; the one before it stays, should the round be asked again.

        In bfloat16: a residual is a correction, and takes half the room of the weights.
        """
        if not residual:
            return
        _forget_old_runs()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{round_number}{SUFFIX}"
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({n: t.to(torch.bfloat16).contiguous() for n, t in residual.items()}, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        synchronise(self._folder)
        earlier = sorted(number for number in self._files() if number < round_number)
        for number in earlier[:-1]:
            (self._folder / f"{number}{SUFFIX}").unlink(missing_ok=True)

    @property
    def _folder(self) -> Path:
        # A node's name may be anything; its digest is a folder's name everywhere.
        return _root() / self.run / hashlib.sha256(self.node.encode()).hexdigest()[:16]

    def _files(self) -> dict[int, Path]:
        if not self._folder.is_dir():
            return {}
        found = self._folder.glob(f"*{SUFFIX}")
        return {int(path.stem): path for path in found if path.stem.isdigit()}


def _root() -> Path:
    return cache_folder() / "residuals"


def _forget_old_runs() -> None:
    if not _root().is_dir():
        return
    for folder in _root().iterdir():
        newest = max((p.stat().st_mtime for p in folder.rglob("*")), default=0.0)
        if time.time() - newest > FORGOTTEN_AFTER:
            shutil.rmtree(folder, ignore_errors=True)
