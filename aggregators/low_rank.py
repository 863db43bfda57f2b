"""The low-rank family: a change B diag(scale) A per tensor. Sums are stacks, so sums are exact.

FLoRA (Wang et al., 2024), eq. 6: sum_i p_i s_i B_i A_i = [p_1 s_1 B_1, ...] [A_1; ...].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aggregators.along_probes import rank1_sides
from aggregators.dense import Dense
from aggregators.layout import Layout
from aggregators.update import require_layout

Scale = float | int | Tensor


@dataclass(frozen=True)
class Factors:
    """B [out, r], A [r, in], scale float64 [r]; the change is B diag(scale) A."""

    B: Tensor
    A: Tensor
    scale: Tensor

    def dense(self) -> Tensor:
        """The change, float64 [out, in]."""
        return (self.B.double() * self.scale) @ self.A.double()


class LowRank:
    """A sum of rank-one changes per tensor, in layout coordinates.

    ``factors``: name -> (B [out, r], A [r, in], scale), scale one number or a vector [r]. For GPT-2's
    Conv1D, whose weight is [in, out], the layout factors of peft's A and B are (A^T, B^T).
    Raises ValueError for tensors that the layout does not have and for shapes that do not fit.
    """

    family: ClassVar[str] = "low_rank"

    def __init__(self, layout: Layout, factors: Mapping[str, tuple[Tensor, Tensor, Scale]]) -> None:
        self._layout = layout
        self.factors: dict[str, Factors] = {
            name: _checked(layout, name, *parts) for name, parts in factors.items()
        }

    @property
    def layout(self) -> Layout:
        """The coordinate system."""
        return self._layout

    @property
    def ranks(self) -> dict[str, int]:
        """Number of rank components per tensor."""
        return {name: factors.B.shape[1] for name, factors in self.factors.items()}

    def rank(self, name: str) -> int:
        """Number of rank components of one tensor; 0 where it is not touched."""
        return self.ranks.get(name, 0)

    def dense(self, layout: Layout | None = None) -> dict[str, Tensor]:
        """The change as float64 tensors."""
        require_layout(layout or self.layout, self.layout)
        return {name: factors.dense() for name, factors in self.factors.items()}

    def __mul__(self, coefficient: float) -> LowRank:
        scaled = {n: (f.B, f.A, f.scale * float(coefficient)) for n, f in self.factors.items()}
        return LowRank(self.layout, scaled)

    __rmul__ = __mul__

    def __add__(self, other: LowRank) -> LowRank:
        if not isinstance(other, LowRank):
            return NotImplemented
        return stack([self, other])

    def __sub__(self, other: LowRank) -> LowRank:
        return self + other * -1.0

    def __eq__(self, other: object) -> bool:
        """Equal factors, bit for bit (not merely an equal change)."""
        if not isinstance(other, LowRank) or self.layout != other.layout:
            return False
        if self.factors.keys() != other.factors.keys():
            return False
        return all(
            _same(mine.B, theirs.B) and _same(mine.A, theirs.A) and _same(mine.scale, theirs.scale)
            for mine, theirs in ((f, other.factors[n]) for n, f in self.factors.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def squared_norm(self) -> float:
        """sum ||B diag(s) A||_F^2 from r x r Gram matrices; invariant under (BQ, Q^-1 A)."""
        total = self.inner(self)
        # Rounding may leave a little less than 0. Not max(0, total): that makes 0 of NaN, and
        # factors that overflow would pass for a change of norm 0.
        return 0.0 if total < 0 else total

    def inner(self, other: Any) -> float:
        """Inner product; never forms B diag(s) A.

        Between stacks sum tr((B_1^T B_2)(A_2 A_1^T)), scales included; with a Dense D
        sum tr(B^T D A^T).
        """
        require_layout(other.layout, self.layout)
        if not isinstance(other, LowRank | Dense):
            return float(other.inner(self))
        theirs: Mapping[str, Any] = other.tensors if isinstance(other, Dense) else other.factors
        total = 0.0
        # Sums of floats have to be taken in one order: the layout's.
        for name in sorted(self.factors.keys() & theirs.keys(), key=self.layout.tensor_id):
            one, two = self.factors[name], theirs[name]
            scaled = one.B.double() * one.scale
            if isinstance(two, Factors):
                left = scaled.T @ (two.B.double() * two.scale)
                right = one.A.double() @ two.A.double().T
            else:
                left, right = scaled, two.double() @ one.A.double().T
            total += float((left * right).sum())
        return total

    def project(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Coordinates <change, z_k> along rank-1 probes, by tensor: float64 [K].

        <B diag(s) A, u v^T> = (u^T B) diag(s) (A v): O(r (m + n)) a probe, and the same for every gauge.
        """
        found = {}
        for name, factors in self.factors.items():
            shape, tensor_id = self.layout.shape(name), self.layout.tensor_id(name)
            u, v = rank1_sides(shape, seeds, tensor_id)
            left = (u.T @ factors.B.double()) * factors.scale
            found[name] = (left * (factors.A.double() @ v).T).sum(dim=1)
        return found

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        return f"LowRank({len(self.factors)} tensors, ranks {ranks})"


def stack(updates: list[LowRank]) -> LowRank:
    """The sum of updates, at least one, as one stack of their components in the given order."""
    layout = updates[0].layout
    parts: dict[str, list[Factors]] = {}
    for update in updates:
        require_layout(update.layout, layout)
        for name, factors in update.factors.items():
            parts.setdefault(name, []).append(factors)
    return LowRank(
        layout,
        {
            name: (
                torch.cat([f.B for f in parts[name]], dim=1),
                torch.cat([f.A for f in parts[name]], dim=0),
                torch.cat([f.scale for f in parts[name]]),
            )
            for name in sorted(parts, key=layout.tensor_id)
        },
    )


def _checked(layout: Layout, name: str, b: Tensor, a: Tensor, scale: Scale) -> Factors:
    if name not in layout:
        raise ValueError(f"the layout has no tensor {name!r}")
    shape = layout.shape(name)
    if b.ndim != 2 or a.ndim != 2 or len(shape) != 2:
        raise ValueError(f"layer {name!r}: B, A and the tensor must have two dimensions")
    if (b.shape[0], a.shape[1]) != shape or b.shape[1] != a.shape[0]:
        raise ValueError(
            f"layer {name!r}: B {list(b.shape)} and A {list(a.shape)} do not make a change of"
            f" shape {list(shape)}"
        )
    if b.shape[1] < 1:
        raise ValueError(f"layer {name!r}: a change of rank 0 is left out, not sent")
    if not (b.is_floating_point() and a.is_floating_point()):
        raise ValueError(f"layer {name!r}: factors must be floating point")
    weights = torch.as_tensor(scale, dtype=torch.float64)
    if weights.ndim == 0:
        weights = weights.expand(b.shape[1]).clone()
    if weights.shape != (b.shape[1],):
        raise ValueError(f"layer {name!r}: scale needs one number or one per rank component")
    return Factors(b, a, weights)


def _same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)
