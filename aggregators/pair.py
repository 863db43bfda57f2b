"""Two updates of unlike families in one reply: what a node sends that trains in two ways at once.

It is their sum, and no family of its own in the mixing: each part goes to its family with the node's
weight (``mixing.aggregate``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from aggregators.layout import Layout
from aggregators.update import Update, require_layout


class Pair:
    """change = the sum of the changes of ``parts``, two updates of one layout and unlike families.

    Pairs of the same families add part by part. Raises ValueError for anything else.
    """

    family: ClassVar[str] = "pair"

    def __init__(self, parts: Sequence[Update]) -> None:
        families = [part.family for part in parts]
        if len(families) != 2 or len(set(families)) != 2 or self.family in families:
            raise ValueError(f"a pair is of two families, not of {', '.join(families) or 'none'}")
        one, two = parts
        require_layout(two.layout, one.layout)
        self.parts: tuple[Any, Any] = (one, two)

    @property
    def layout(self) -> Layout:
        """The coordinate system."""
        layout: Layout = self.parts[0].layout
        return layout

    def dense(self, layout: Layout | None = None) -> dict[str, Tensor]:
        """The change as float64 tensors."""
        total: dict[str, Tensor] = {}
        for part in self.parts:
            for name, change in part.dense(layout or self.layout).items():
                total[name] = total[name] + change if name in total else change
        return total

    def __mul__(self, coefficient: float) -> Pair:
        return Pair([part * coefficient for part in self.parts])

    __rmul__ = __mul__

    def __add__(self, other: Pair) -> Pair:
        if not isinstance(other, Pair):
            return NotImplemented
        if [p.family for p in self.parts] != [p.family for p in other.parts]:
            raise ValueError("pairs of other families cannot be added")
        return Pair([one + two for one, two in zip(self.parts, other.parts, strict=True)])

    def __sub__(self, other: Pair) -> Pair:
        return self + other * -1.0

    def __eq__(self, other: object) -> bool:
        """Equal parts, bit for bit."""
        return isinstance(other, Pair) and self.parts == other.parts

    __hash__ = None  # type: ignore[assignment]

    def squared_norm(self) -> float:
        """Sum of squares of all elements of the change."""
        one, two = self.parts
        return float(one.squared_norm() + two.squared_norm() + 2 * one.inner(two))

    def inner(self, other: Any) -> float:
        """Inner product with an update of any family."""
        theirs = parts_of(other)
        return sum(float(mine.inner(part)) for mine in self.parts for part in theirs)

    def __repr__(self) -> str:
        return f"Pair({self.parts[0]!r}, {self.parts[1]!r})"


def parts_of(update: Any) -> tuple[Any, ...]:
    """The updates of single families that an update is the sum of."""
    return update.parts if isinstance(update, Pair) else (update,)
