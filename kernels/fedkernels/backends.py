"""Which implementation computes a primitive.

`reference` is torch and always there. `portable`, `avx2`, `avx512` and `neon` are the compiled
extension `fedkernels._cpu`, the same source for growing instruction sets, chosen at run time. `triton`
serves every tensor on a GPU, whatever is chosen for those on the CPU; it is never the default, but may
be chosen for them where Triton's interpreter is on (TRITON_INTERPRET=1 before the start), which is
for tests. Where bits are a law all give the same, so the choice is about speed alone.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
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
_ON_CPU: Final = ["reference", *_COMPILED]
# As Triton itself reads it, when it is imported.
_YES: Final = ("1", "true", "on", "yes", "y")
_INTERPRETER: Final = os.environ.get("TRITON_INTERPRET", "").lower() in _YES


class _Selection:
    """The one piece of process-wide state of this package: the name of the backend in use."""

    name: str = _ON_CPU[-1]
    notice_due: bool = not _compiled


def backends() -> list[str]:
    """Return the names of the backends that work in this process: slowest first, then `triton`."""
    return [*cpu_backends(), "triton"] if _triton_works() else cpu_backends()


def cpu_backends() -> list[str]:
    """Return the names of those that are made for tensors on the CPU, slowest first."""
    return list(_ON_CPU)


def backend() -> str:
    """Return the backend in use for tensors on the CPU: the fastest unless `use_backend` was called."""
    return _Selection.name


def use_backend(name: str) -> None:
    """Use the backend `name` from now on, in every thread; ValueError if it is not available."""
    if name not in backends():
        available = ", ".join(backends())
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


def uses_triton(device: torch.device) -> bool:
    """Return whether `fedkernels.gpu` computes for tensors on `device`.

    Raises:
        ValueError: `triton` was chosen for tensors on the CPU, and its interpreter is off.
    """
    if device.type == "cuda":
        return _triton_works()
    if _Selection.name == "triton" and not _INTERPRETER:
        raise ValueError(
            f"device {device}: the backend 'triton' computes on a GPU; move the tensor there, or "
            "set TRITON_INTERPRET=1 before starting Python"
        )
    return _Selection.name == "triton"


@functools.cache
def _triton_works() -> bool:
    """Asked for late, since looking for a GPU starts its driver, after which a process must not fork."""
    if importlib.util.find_spec("triton") is None:
        return False
    return _INTERPRETER or torch.cuda.is_available()


def threads() -> int:
    """Return how many threads a compiled kernel may use: torch's own number, at this moment."""
    return torch.get_num_threads()
