"""All families of the kernel benchmark, found by what is in this package."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator

from simulations.benchmarks import kernels
from simulations.benchmarks.kernels.row import Row

Measure = Callable[[bool], list[Row]]


def families() -> dict[str, Measure]:
    """Return each family's function ``rows``; a module without one is no family."""
    found: dict[str, Measure] = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        rows = getattr(importlib.import_module(f"{kernels.__name__}.{module.name}"), "rows", None)
        if rows is not None:
            found[module.name] = rows
    return found


def collect(chosen: dict[str, Measure], quick: bool) -> Iterator[tuple[str, list[Row] | Exception]]:
    """Measure one family after another; one that fails yields its error and costs the others nothing."""
    for name, measure in chosen.items():
        try:
            yield name, measure(quick)
        except Exception as error:
            yield name, error
