"""The exact running sum of change along probes: integers, so that order, device and count never matter.

A run's zeroth-order part is one such sum over its pool of seeds; a round of random projections is
another, over that round's seeds. Both say what a node needs to have the same weights, in O(K) bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import fedkernels as fk
from aggregators.bit_packing import pack_bits, unpack_bits, width_of
from aggregators.layout import Layout
from aggregators.probe_codec import read_reach
from aggregators.projected import ProjectedGradient
from aggregators.reach import EVERYTHING, Reach
from aggregators.seed_scalars import SeedScalars
from aggregators.update import UpdateRejected, Verdict, require_layout

LARGEST_TOTAL = 2**31 - 1
PROJECTION_BITS = 30
SMALLEST_EXPONENT, LARGEST_EXPONENT = -500, 500
TOTALS = "totals"


class ProbeSum:
    """change of tensor t = 2**exponent * sum_k totals[t][k] * z_k, z_k = z(derive_seed(master_seed, k)).

    ``vectors``: int64 [K] each, within int32; ``places``: name -> position of its vector, so that all
    tensors of a pool share one. ``reach``: what each probe moves of them. Immutable. Raises ValueError
    for anything else.
    """

    def __init__(
        self,
        layout: Layout,
        master_seed: int,
        probe: str,
        exponent: int,
        vectors: Iterable[Tensor],
        places: Mapping[str, int],
        reach: Reach = EVERYTHING,
    ) -> None:
        if type(exponent) is not int or not SMALLEST_EXPONENT <= exponent <= LARGEST_EXPONENT:
            raise ValueError(
                f"exponent {exponent!r} is not in [{SMALLEST_EXPONENT}, {LARGEST_EXPONENT}]"
            )
        if type(master_seed) is not int or not 0 <= master_seed < 2**63:
            raise ValueError(f"master_seed {master_seed!r} is not in [0, 2**63)")
        if probe not in fk.PROBES:
            raise ValueError(f"unknown probe {probe!r}; available: {', '.join(fk.PROBES)}")
        self.layout, self.master_seed, self.probe = layout, master_seed, probe
        self.exponent = exponent
        self.vectors = tuple(vector.to(torch.int64) for vector in vectors)
        self.places = {name: places[name] for name in sorted(places, key=layout.tensor_id)}
        self.reach = reach
        self._block = reach.block_of(layout, self.places)
        for vector in self.vectors:
            if vector.ndim != 1 or len(vector) < 1:
                raise ValueError("totals must be vectors, not empty")
            if int(vector.abs().max()) > LARGEST_TOTAL:
                raise ValueError("a total does not fit 32 bits")
        if sorted(set(self.places.values())) != list(range(len(self.vectors))):
            raise ValueError("every vector of totals needs a tensor, and every tensor a vector")

    @classmethod
    def pool(
        cls,
        layout: Layout,
        master_seed: int,
        pool_size: int,
        probe: str,
        exponent: int,
        names: Iterable[str] | None = None,
        reach: Reach = EVERYTHING,
    ) -> ProbeSum:
        """No change yet along the probes of a pool, which reach ``names`` (None: all tensors)."""
        reached = [spec.name for spec in layout] if names is None else names
        places = dict.fromkeys(reached, 0)
        return cls(layout, master_seed, probe, exponent, [torch.zeros(pool_size)], places, reach)

    @classmethod
    def of_projection(cls, update: ProjectedGradient) -> ProbeSum:
        """A projection in steps of one power of two, the finest that hold its largest in 31 bits."""
        values = {n: vector.double() / len(vector) for n, vector in update.coordinates.items()}
        largest = max((float(v.abs().max()) for v in values.values()), default=0.0)
        exponent = _clamp(math.frexp(largest)[1] - PROJECTION_BITS) if largest > 0 else 0
        vectors = [torch.round(v * math.ldexp(1.0, -exponent)) for v in values.values()]
        places = {name: place for place, name in enumerate(values)}
        return cls(update.layout, update.master_seed, update.probe, exponent, vectors, places)

    def add(self, update: SeedScalars) -> ProbeSum:
        """The sum with scalars of the same pool, each rounded once to the sum's steps.

        Steps are doubled until every scalar and every total is within 32 bits. Raises ValueError for
        another pool.
        """
        require_layout(update.layout, self.layout)
        if not self.is_of(update):
            raise ValueError(f"the pool {update.pool} is not this sum's")
        totals, exponent = self.vectors[0].clone(), self.exponent
        largest = float(update.scalars.abs().max()) if len(update.scalars) else 0.0
        coarser = math.frexp(largest)[1] - LARGEST_TOTAL.bit_length() - exponent
        if coarser > 0:
            totals = torch.round(totals.double() * math.ldexp(1.0, -coarser)).to(torch.int64)
            exponent += coarser
        steps = torch.round(update.scalars * math.ldexp(1.0, -exponent))
        totals[update.indices] += steps.to(torch.int64)
        while int(totals.abs().max()) > LARGEST_TOTAL:
            totals, exponent = torch.round(totals.double() / 2).to(torch.int64), exponent + 1
        return ProbeSum(
            self.layout, self.master_seed, self.probe, exponent, [totals], self.places, self.reach
        )

    def is_of(self, update: SeedScalars) -> bool:
        """Whether scalars are along this sum's probes."""
        names = tuple(self.places) if len(self.places) < len(self.layout) else None
        own = (self.master_seed, self.size, self.probe, names, self.reach)
        return len(self.vectors) == 1 and update.pool == own

    @property
    def size(self) -> int:
        """K of the largest vector."""
        return max((len(vector) for vector in self.vectors), default=0)

    @property
    def used(self) -> int:
        """Totals that are not zero."""
        return sum(int((vector != 0).sum()) for vector in self.vectors)

    def replay_(self, name: str, weight: Tensor) -> Tensor:
        """Move the weight of a tensor by its change, rounding once; returns it.

        weight: float32, bfloat16 or float16 of the layout's shape. Tensors without totals stay.
        """
        seeds, totals = self.terms(name)
        if len(seeds) == 0:
            return weight
        tensor_id = self.layout.tensor_id(name)
        mask = self.reach.mask(self.master_seed, tensor_id, weight.shape)
        before = None if mask is None else weight.clone()
        fk.replay_(weight, seeds, totals, self.exponent, tensor_id, self.probe)
        if mask is not None and before is not None:
            weight.copy_(torch.where(mask, weight, before))
        return weight

    def terms(self, name: str) -> tuple[Tensor, Tensor]:
        """Seeds and totals, int64 each, of the probes that move a tensor; empty where none does."""
        if name not in self.places:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        return self._steps[self.places[name]][self._block[name]]

    @functools.cached_property
    def _steps(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Of each vector, for each block, the seeds and the totals that are not zero."""
        found = []
        for vector in self.vectors:
            indices = vector.nonzero()[:, 0]
            derived = [fk.derive_seed(self.master_seed, index) for index in indices.tolist()]
            seeds = torch.tensor(derived, dtype=torch.int64)
            blocks = indices % self.reach.blocks
            found.append(
                [
                    (seeds[blocks == block], vector[indices[blocks == block]])
                    for block in range(self.reach.blocks)
                ]
            )
        return found

    def dense(self) -> dict[str, Tensor]:
        """The change as float64 tensors; slow, for tests and small models."""
        found: dict[str, Tensor] = {}
        for name, place in self.places.items():
            totals = self.vectors[place]
            indices = totals.nonzero()[:, 0].tolist()
            if not indices:
                continue
            shape, tensor_id = self.layout.shape(name), self.layout.tensor_id(name)
            change = torch.zeros(shape, dtype=torch.float64)
            for index in indices:
                if index % self.reach.blocks != self._block[name]:
                    continue
                seed = fk.derive_seed(self.master_seed, index)
                z = fk.noise(seed, tensor_id, shape, self.probe).double()
                change += math.ldexp(int(totals[index]), self.exponent) * z
            mask = self.reach.mask(self.master_seed, tensor_id, shape)
            found[name] = change if mask is None else change * mask
        return found

    def parts(self, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors; the totals of all vectors lie behind each other, as narrow as they fit."""
        everything = torch.cat(self.vectors)
        width = width_of(everything)
        header: dict[str, Any] = {
            "seed": self.master_seed,
            "probe": self.probe,
            "exponent": self.exponent,
            "sizes": [len(vector) for vector in self.vectors],
            "bits": width,
        }
        if self.reach != EVERYTHING:
            header["reach"] = [self.reach.blocks, self.reach.density]
        if self.places != {spec.name: 0 for spec in self.layout}:
            ids = [self.layout.tensor_id(name) for name in self.places]
            header["places"] = [ids, list(self.places.values())]
        return header, {f"{prefix}{TOTALS}": pack_bits(everything, width)}

    @classmethod
    def from_parts(
        cls, header: dict[str, Any], tensors: Mapping[str, Tensor], prefix: str, layout: Layout
    ) -> ProbeSum:
        """What ``parts`` wrote. Raises UpdateRejected for anything else."""
        try:
            sizes = header["sizes"]
            totals = unpack_bits(tensors[f"{prefix}{TOTALS}"], header["bits"], sum(sizes))
            vectors = torch.split(totals, sizes)
            ids, places = header.get("places", (range(len(layout)), [0] * len(layout)))
            named = {layout.tensors[i].name: p for i, p in zip(ids, places, strict=True)}
            return cls(
                layout, header["seed"], header["probe"], header["exponent"], vectors, named,
                read_reach(header),
            )  # fmt: skip
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise UpdateRejected(Verdict.MALFORMED, f"unreadable probe sum: {error}") from None

    def __eq__(self, other: object) -> bool:
        """Equal probes, exponents and totals."""
        return (
            isinstance(other, ProbeSum)
            and self.layout == other.layout
            and (self.master_seed, self.probe, self.exponent, self.places, self.reach)
            == (other.master_seed, other.probe, other.exponent, other.places, other.reach)
            and all(torch.equal(a, b) for a, b in zip(self.vectors, other.vectors, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ProbeSum({self.used} of {self.size} x {len(self.vectors)}, {self.probe})"


def _clamp(exponent: int) -> int:
    return max(SMALLEST_EXPONENT, min(LARGEST_EXPONENT, exponent))
