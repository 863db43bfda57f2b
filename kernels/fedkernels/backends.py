"""Which implementation computes the probes.

`reference` is torch and always there; `portable` is the compiled C++ extension `fedkernels._cpu`.
Both give the same bits, so the choice is about speed alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import torch

from fedkernels import reference

try:
    from fedkernels import _cpu
except ImportError:  # installed on a machine without a C++ compiler
    _compiled = False
else:
    _compiled = True

Rademacher = Callable[[int, int, int], torch.Tensor]

_log = logging.getLogger(__name__)


def _portable_rademacher(seed: int, tensor_id: int, count: int) -> torch.Tensor:
    values = torch.empty(count, dtype=torch.float32)
    _cpu.rademacher_(values, seed, tensor_id, 0)
    return values


_RADEMACHER: Final[dict[str, Rademacher]] = {"reference": reference.rademacher}
if _compiled:
    _RADEMACHER["portable"] = _portable_rademacher


class _Selection:
    """The one piece of process-wide state of this package: the name of the backend in use."""

    name: str = "portable" if _compiled else "reference"
    notice_due: bool = not _compiled


def backends() -> list[str]:
    """Return the names of the backends that work in this process, slowest first."""
    return list(_RADEMACHER)


def backend() -> str:
    """Return the name of the backend in use: the fastest one until `use_backend` says otherwise."""
    return _Selection.name


def use_backend(name: str) -> None:
    """Use the backend `name` from now on, in every thread; ValueError if it is not available."""
    if name not in _RADEMACHER:
        available = ", ".join(_RADEMACHER)
        raise ValueError(f"backend {name!r} is not available here; choose one of: {available}")
    _Selection.name = name


def rademacher(seed: int, tensor_id: int, count: int) -> torch.Tensor:
    """Return the Rademacher probe of `reference.rademacher`, computed by the backend in use."""
    if _Selection.notice_due:
        _Selection.notice_due = False
        _log.warning("fedkernels: no compiled kernels here, using the slower reference in torch")
    return _RADEMACHER[_Selection.name](seed, tensor_id, count)
