"""Launching a kernel where its tensors are."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any
) -> None:
    """Run a kernel on `device`, which need not be the process's present GPU; an empty grid is none.

    No contraction: where a law has two roundings, a fused multiply-add would have one.
    """
    if 0 in grid:
        return
    present = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with present:
        kernel[grid](*arguments, **constants, enable_fp_fusion=False)
