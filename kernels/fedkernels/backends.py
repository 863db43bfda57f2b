"""Which implementation computes a primitive.

`reference` is torch and always there. `portable`, `avx2`, `avx512` and `neon` are the compiled
extension `fedkernels._cpu`, the same source for growing instruction sets, chosen at run time. `triton`
serves tensors on a GPU, and tensors on the CPU where Triton's interpreter is on (TRITON_INTERPRET=1).
Where bits are a law all give the same, so the choice is about speed alone.
"""

from __future__ import annotations

import logging
from typing import Final

import torch

try:
    from fedkernels import _cpu
except ImportError:  # installed on a machine without a C++ compiler
    _compiled = False
else:
    _compiled = True

# The numbers of cpu/isa.h; slowest first.
INSTRUCTION_SETS: Final[dict[str, int]] = {"portable": 0, "neon": 3, "avx2": 1, "avx512": 2}

_log = logging.getLogger(__name__)
_COMPILED = [name for name, isa in INSTRUCTION_SETS.items() if _compiled and _cpu.available(isa)]
_AVAILABLE: Final = ["reference", *_COMPILED]


class _Selection:
    """The one piece of process-wide state of this package: the name of the backend in use."""

    name: str = _AVAILABLE[-1]
    notice_due: bool = not _compiled


def backends() -> list[str]:
    """Return the names of the backends that work in this process, slowest first."""
    return list(_AVAILABLE)


def backend() -> str:
    """Return the name of the backend in use: the fastest one until `use_backend` says otherwise."""
    return _Selection.name


def use_backend(name: str) -> None:
    """Use the backend `name` from now on, in every thread; ValueError if it is not available."""
    if name not in _AVAILABLE:
        available = ", ".join(_AVAILABLE)
        raise ValueError(f"backend {name!r} is not available here; choose one of: {available}")
    _Selection.name = name


def instruction_set() -> int | None:
    """Return the number (`cpu/isa.h`) that compiled kernels are called with; None: the reference.

    A machine without compiled kernels says so once, in the log.
    """
    if _Selection.notice_due:
        _Selection.notice_due = False
        _log.warning("fedkernels: no compiled kernels here, using the slower reference in torch")
    return INSTRUCTION_SETS.get(_Selection.name)


def threads() -> int:
    """Return how many threads a compiled kernel may use: torch's own number, at this moment."""
    return torch.get_num_threads()
