"""What a node is told of the global model: one low-rank adapter, and exact sums along probes.

Base and view are the model. Nodes that hold full weights add both to a copy of the base; others put
them beside the base (docs/architecture.md).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from aggregators.basis import Basis
from aggregators.codec import Header, pack, update_from_parts, update_parts
from aggregators.dense import Dense
from aggregators.layout import Layout
from aggregators.low_rank import LowRank
from aggregators.probe_sum import ProbeSum
from aggregators.update import UpdateRejected, Verdict

Factors = tuple[Tensor, Tensor, Tensor]
ADAPTER, SUMS, WHOLE, BASIS = "adapter", "sums", "whole", "basis"
LEVELS = "levels"


@dataclass(frozen=True)
class View:
    """``adapter``: low-rank change, None for none. ``sums``: change along probes, exact.

    ``whole``: change of small tensors, element by element. ``basis``: no change, but what a node that
    sends a sketch is to see its own through. ``levels``: no change either, but how likely a node draws
    each seed of the pool, a byte a seed (``seed_sampling``).
    """

    adapter: LowRank | None = None
    sums: tuple[ProbeSum, ...] = ()
    whole: Dense | None = None
    basis: Basis | None = None
    levels: bytes | None = None

    @property
    def empty(self) -> bool:
        """Whether this is the base model itself."""
        return self.adapter is None and not self.full_rank

    @property
    def full_rank(self) -> bool:
        """Whether there is change that no adapter holds."""
        return self.whole is not None or any(one.used for one in self.sums)

    def factors(self) -> dict[str, Factors] | None:
        """The adapter's float32 factors (B, A, scale) by tensor name; None where there is none."""
        if self.adapter is None:
            return None
        return {n: (f.B.float(), f.A.float(), f.scale) for n, f in self.adapter.factors.items()}

    def moved(self, name: str, weight: Tensor) -> Tensor:
        """A tensor's weight with the view's change: float32, memory of its own.

        One rounding a part: the adapter's product is added in float64, so that devices that order its
        sums otherwise still round to the same float32; small tensors' change likewise; and each sum
        along probes is exact until it is added. A run has one pool, but with random projections a sum a
        round, each of which rounds again, by at most 2^-24 of the weight.
        """
        result = weight.detach().to(torch.float32, copy=True)
        if self.adapter is not None and name in self.adapter.factors:
            factors = self.adapter.factors[name]
            change = (factors.B.double() * factors.scale) @ factors.A.double()
            result = change.add_(weight.double()).float()
        if self.whole is not None and name in self.whole.tensors:
            result = (result.double() + self.whole.tensors[name]).float()
        for one in self.sums:
            one.replay_(name, result)
        return result

    def digest(self) -> str:
        """SHA-256 of what the view says; "" for the base itself."""
        if self.empty:
            return ""
        header, tensors = view_parts(replace(self, basis=None, levels=None), None)
        return hashlib.sha256(pack(header, tensors)).hexdigest()

    def as_sent(self, dtype: str | None) -> View:
        """The view with its adapter rounded as the wire's type rounds it: what nodes really see."""
        if self.adapter is None:
            return self
        header, tensors = update_parts(self.adapter, dtype)
        adapter = update_from_parts(header, tensors, self.adapter.layout)
        assert isinstance(adapter, LowRank)
        return replace(self, adapter=adapter)


@dataclass(frozen=True)
class SealedView:
    """A view as it came: unread until the node knows the layout."""

    header: Header
    tensors: dict[str, Tensor]

    def read(self, layout: Layout) -> View:
        """The view. Raises UpdateRejected where it is none of this layout."""
        return read_view(self.header, self.tensors, layout)


def view_parts(view: View, dtype: str | None) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of a view; ``dtype`` is the adapter's, sums are exact."""
    header: Header = {}
    tensors: dict[str, Tensor] = {}
    if view.adapter is not None:
        fields, factors = update_parts(view.adapter, dtype)
        header[ADAPTER] = fields
        tensors |= {f"{ADAPTER}.{key}": tensor for key, tensor in factors.items()}
    if view.sums:
        header[SUMS] = []
        for place, one in enumerate(view.sums):
            fields, totals = one.parts(f"{SUMS}.{place}.")
            header[SUMS].append(fields)
            tensors |= totals
    if view.whole is not None:
        header[WHOLE], elements = update_parts(view.whole, "float32")
        tensors |= {f"{WHOLE}.{key}": tensor for key, tensor in elements.items()}
    if view.basis is not None:
        header[BASIS], sides = view.basis.parts()
        tensors |= {f"{BASIS}.{key}": tensor for key, tensor in sides.items()}
    if view.levels is not None:
        tensors[LEVELS] = torch.frombuffer(bytearray(view.levels), dtype=torch.uint8)
    return header, tensors


def read_view(header: dict[str, Any], tensors: dict[str, Tensor], layout: Layout) -> View:
    """The view that ``view_parts`` wrote. Raises UpdateRejected for anything else."""
    adapter = _part(header, tensors, ADAPTER, LowRank, layout)
    whole = _part(header, tensors, WHOLE, Dense, layout)
    basis = None
    if BASIS in header:
        try:
            basis = Basis.from_parts(header[BASIS], _own(tensors, BASIS), layout)
        except (ValueError, TypeError, AttributeError) as error:
            raise UpdateRejected(Verdict.MALFORMED, f"unreadable basis: {error}") from None
    described = header.get(SUMS, [])
    if not isinstance(described, list):
        raise UpdateRejected(Verdict.MALFORMED, "a view's sums are no list")
    sums = tuple(
        ProbeSum.from_parts(fields, tensors, f"{SUMS}.{place}.", layout)
        for place, fields in enumerate(described)
    )
    levels = tensors.get(LEVELS)
    if levels is not None and (levels.dtype != torch.uint8 or levels.ndim != 1):
        raise UpdateRejected(Verdict.MALFORMED, "a view's levels are not one string of bytes")
    return View(adapter, sums, whole, basis, None if levels is None else bytes(levels.tolist()))


Part = TypeVar("Part", LowRank, Dense)


def _part(
    header: dict[str, Any], tensors: dict[str, Tensor], name: str, kind: type[Part], layout: Layout
) -> Part | None:
    if name not in header:
        return None
    if not isinstance(header[name], dict):
        raise UpdateRejected(Verdict.MALFORMED, f"the view's {name} is not a JSON object")
    found = update_from_parts(header[name], _own(tensors, name), layout)
    if not isinstance(found, kind):
        raise UpdateRejected(Verdict.WRONG_FAMILY, f"a view's {name} cannot be {found.family!r}")
    return found


def _own(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
