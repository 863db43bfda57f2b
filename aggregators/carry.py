"""The carry: the exact running sum of all low-rank change, one sorted SVD per tensor.

Its head is the best approximation of a given rank (Eckart-Young); the tail is what the head leaves out.
Because both are slices of one exact sum, the tail competes again when the next stack is added: that is
the error feedback, and nothing is ever lost on the server.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

import fedkernels as fk
from aggregators.codec import pack, unpack
from aggregators.layout import Layout
from aggregators.low_rank import LowRank
from aggregators.update import UpdateRejected, require_layout


@dataclass(frozen=True)
class Decomposition:
    """U float32 [out, k], sigma float64 [k] descending, Vt float32 [k, in]."""

    U: Tensor
    sigma: Tensor
    Vt: Tensor


class Carry:
    """The sum of all aggregated low-rank change of a run. Immutable: ``add`` returns the next one.

    ``parts``: name -> (U, sigma, Vt). ValueError for tensors that the layout does not have and for
    shapes that do not fit.
    """

    def __init__(self, layout: Layout, parts: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
        self._layout = layout
        for name, part in parts.items():
            _check(layout, name, Decomposition(*part))
        self.parts = {
            name: Decomposition(*parts[name]) for name in sorted(parts, key=layout.tensor_id)
        }

    @classmethod
    def empty(cls, layout: Layout) -> Carry:
        """No change."""
        return cls(layout, {})

    @property
    def layout(self) -> Layout:
        """The coordinate system."""
        return self._layout

    @property
    def rank(self) -> int:
        """The largest rank of any tensor's sum."""
        return max((len(part.sigma) for part in self.parts.values()), default=0)

    def add(self, change: LowRank, method: str = "auto") -> Carry:
        """The sum with one more stack, recompressed without loss (``fk.stack_svd``)."""
        require_layout(change.layout, self.layout)
        following = {name: (part.U, part.sigma, part.Vt) for name, part in self.parts.items()}
        for name, factors in change.factors.items():
            stack: list[tuple[Tensor, Tensor, Tensor]] = [(factors.B, factors.A, factors.scale)]
            if name in self.parts:
                before = self.parts[name]
                stack.insert(0, (before.U, before.Vt, before.sigma))
            u, sigma, vt = fk.stack_svd(stack, method=method)
            following[name] = (u, sigma, vt)
        kept = {name: part for name, part in following.items() if len(part[1]) > 0}
        return Carry(self.layout, kept)

    def head(self, rank: int | None = None, energy: float | None = None) -> LowRank:
        """The best approximation: at most ``rank`` components, and as few as keep ``energy``.

        ``energy`` in (0, 1] is a fraction of each tensor's squared norm.
        """
        return self._slice(rank, energy, head=True)

    def tail(self, rank: int | None = None, energy: float | None = None) -> LowRank:
        """What ``head`` with the same limits leaves out: head + tail is the carry."""
        return self._slice(rank, energy, head=False)

    def tail_energy(self, rank: int | None = None, energy: float | None = None) -> float:
        """||tail||_F / ||carry||_F over all tensors, in [0, 1]; 0 for an empty carry."""
        left, total = 0.0, 0.0
        for part in self.parts.values():
            squares = part.sigma.square()
            left += float(squares[self._kept(part, rank, energy) :].sum())
            total += float(squares.sum())
        return math.sqrt(left / total) if total > 0 else 0.0

    def dense(self) -> dict[str, Tensor]:
        """The sum as float64 tensors."""
        return {
            name: (part.U.double() * part.sigma) @ part.Vt.double()
            for name, part in self.parts.items()
        }

    def to_bytes(self) -> bytes:
        """Deterministic bytes."""
        tensors: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            tensors |= {f"{name}#U": part.U, f"{name}#S": part.sigma, f"{name}#V": part.Vt}
        return pack({"schema": 1, "carry": self.layout.fingerprint}, tensors)

    @classmethod
    def from_bytes(cls, data: bytes, layout: Layout) -> Carry:
        """Read ``to_bytes``'s bytes, which the caller trusts. ValueError where they are not."""
        try:
            header, tensors = unpack(data)
        except UpdateRejected as error:
            raise ValueError(f"not a carry: {error}") from None
        if header.get("carry") != layout.fingerprint:
            raise ValueError("this carry is of another layout, or no carry")
        names = {key.rpartition("#")[0] for key in tensors}
        missing = {f"{n}#{part}" for n in names for part in "USV"} - tensors.keys()
        if missing:
            raise ValueError(f"not a carry: {min(missing)!r} is missing")
        return cls(
            layout,
            {n: (tensors[f"{n}#U"], tensors[f"{n}#S"], tensors[f"{n}#V"]) for n in names},
        )

    def digest(self) -> str:
        """SHA-256 of ``to_bytes``."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def _slice(self, rank: int | None, energy: float | None, *, head: bool) -> LowRank:
        factors = {}
        for name, part in self.parts.items():
            kept = self._kept(part, rank, energy)
            chosen = slice(0, kept) if head else slice(kept, None)
            roots = part.sigma[chosen].sqrt()
            if len(roots) == 0:
                continue
            # Both factors get the root, so that a short type on the wire serves them alike.
            b = (part.U[:, chosen].double() * roots).float()
            a = (roots[:, None] * part.Vt[chosen].double()).float()
            factors[name] = (b, a, 1.0)
        return LowRank(self.layout, factors)

    @staticmethod
    def _kept(part: Decomposition, rank: int | None, energy: float | None) -> int:
        if rank is not None and rank < 0:
            raise ValueError(f"rank must not be negative, and it is {rank}")
        if energy is not None and not 0.0 < energy <= 1.0:
            raise ValueError(f"energy must be in (0, 1], and it is {energy}")
        kept = len(part.sigma)
        if energy is not None:
            squares = part.sigma.square().cumsum(0)
            kept = int((squares < energy * squares[-1]).sum()) + 1
        return kept if rank is None else min(kept, rank)

    def __repr__(self) -> str:
        return f"Carry({len(self.parts)} tensors, rank {self.rank})"


def _check(layout: Layout, name: str, part: Decomposition) -> None:
    if name not in layout:
        raise ValueError(f"the layout has no tensor {name!r}")
    shapes = [tuple(tensor.shape) for tensor in (part.U, part.sigma, part.Vt)]
    size = part.sigma.numel()
    rows, columns = layout.shape(name) if len(layout.shape(name)) == 2 else (0, 0)
    if size < 1 or shapes != [(rows, size), (size,), (size, columns)]:
        raise ValueError(f"layer {name!r}: {shapes} is no decomposition of {rows} x {columns}")
