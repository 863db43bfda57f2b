"""Progress bars that libraries draw without asking: they tear up the display that fedbraid shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, cast


@contextmanager
def hidden(module: ModuleType) -> Iterator[None]:
    """Hide what ``module`` draws through its global ``tqdm``, for modules that have no switch for it.

    TQDM_DISABLE would not do: it is read when tqdm is imported, and torch has done so long before.
    """
    theirs = getattr(module, "tqdm", None)
    if theirs is None:
        yield
        return
    target = cast(Any, module)
    target.tqdm = partial(theirs, disable=True)
    try:
        yield
    finally:
        target.tqdm = theirs
