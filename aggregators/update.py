"""What an update is, and what becomes of one that may not enter.

    UpdateRejected          anything that a node's bytes can be wrong in, with its Verdict

An update is an element of a vector space: ``dense(a * u + b * v) == a * dense(u) + b * dense(v)``.
For all families but one ``dense`` is the change of the weights; for "sketch" it is the coordinates.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from torch import Tensor

from aggregators.layout import Layout

DETAIL_LIMIT = 400  # characters


class Verdict(StrEnum):
    """What the server decided about one node's reply."""

    ACCEPTED = "accepted"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    WRONG_RUN = "wrong_run"
    WRONG_ROUND = "wrong_round"
    STALE = "stale"
    REPLAYED = "replayed"
    WRONG_NODE = "wrong_node"
    WRONG_LAYOUT = "wrong_layout"
    WRONG_BASE = "wrong_base"
    WRONG_BASIS = "wrong_basis"
    WRONG_FAMILY = "wrong_family"
    DUPLICATE = "duplicate"
    UNSIGNED = "unsigned"
    FOREIGN_KEY = "foreign_key"
    FORGED = "forged"
    DIVERGED = "diverged"
    UNKNOWN_TENSOR = "unknown_tensor"
    SHAPE = "shape"
    DTYPE = "dtype"
    RANK = "rank"
    POOL = "pool"
    EMPTY = "empty"
    OVERFLOW = "overflow"
    NOT_FINITE = "not_finite"
    NORM = "norm"
    WEIGHT = "weight"
    LATE = "late"
    FAILED = "failed"
    MISSING = "missing"
    REVOKED = "revoked"


class UpdateRejected(Exception):
    """An update that may not enter. ``detail`` says what is wrong and where.

    It may quote what a node sent, so it is cut and escaped: ledgers and terminals show it.
    """

    def __init__(self, verdict: Verdict, detail: str) -> None:
        self.verdict = verdict
        self.detail = "".join(
            character if character.isprintable() else ascii(character)[1:-1]
            for character in detail[:DETAIL_LIMIT]
        )
        super().__init__(verdict, self.detail)  # both, so that it can be pickled between processes

    def __str__(self) -> str:
        return self.detail


@runtime_checkable
class Update(Protocol):
    """A compact linear description of a change of the weights, in the coordinates of a layout."""

    family: ClassVar[str]

    @property
    def layout(self) -> Layout:
        """The coordinate system."""
        ...

    def dense(self, layout: Layout | None = None) -> dict[str, Tensor]:
        """The change as float64 tensors, for the tensors that it touches."""
        ...

    def __mul__(self, coefficient: float) -> Self: ...

    def __add__(self, other: Self) -> Self: ...

    def __sub__(self, other: Self) -> Self: ...

    def squared_norm(self) -> float:
        """Sum of squares of all elements of the change."""
        ...

    def inner(self, other: Any) -> float:
        """Inner product with another update of the same layout, of any family but "sketch".

        A sketch's coordinates are of a space of their own: it has one with sketches of its basis.
        """
        ...


def require_layout(found: Layout, expected: Layout) -> None:
    """Refuse coordinates of another layout: their sum would have no meaning."""
    if found != expected:
        raise ValueError(
            f"layout {found.fingerprint[:12]} is not {expected.fingerprint[:12]}:"
            " updates of different base models cannot be combined"
        )
