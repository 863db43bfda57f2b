"""One vector for all families: the coordinates of a change along one pool of rank-1 probes.

A change D has the coordinates <D, z_k>, tensor by tensor, whoever made it and however it is written.
They are linear in D, so those of a sum are the sum of those of its parts: LoRA stacks, zeroth-order
scalars and projections can be added, masked, clipped and compared as one vector. For rank-1 probes no
dense matrix is made: BA has (u_k^T B)(A v_k), and a sum along such probes is itself U diag(a) V^T.

What estimates of one change by several families weigh: 1/K sum_k <D, z_k> z_k over K independent probes
has a variance in proportion to 1/K, and the mean of two such estimates by their counts K_1 and K_2 *is*
the estimate from all K_1 + K_2 probes. That holds where both are unbiased and of the same D. Updates of
nodes that trained on their own data by other steps are estimates of other changes: examples, not probes,
are their weights, and families add (``aggregators.mixing``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

import fedkernels as fk
from aggregators.along_probes import probe_products, rank1_sides
from aggregators.dense import Dense
from aggregators.low_rank import LowRank
from aggregators.projected import ProjectedGradient
from aggregators.seed_scalars import SeedScalars

Change: TypeAlias = LowRank | SeedScalars | ProjectedGradient | Dense


def coordinates(
    update: Change, master_seed: int, count: int, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """<change, z_k>, k < ``count``, along the rank-1 probes of ``master_seed``: name -> float64 [count].

    Tensors that the update does not touch are left out; ``names`` keeps some of the others. Within 1e-6
    of |change| |z_k| of ``fk.project`` of the dense change. Matrices of low-rank updates take
    O(r (m + n)) a probe, those of updates along j rank-1 probes O(j (m + n)); vectors, and updates along
    other probes, are made dense first. Raises ValueError for a sketch, whose change depends on its
    basis, and for a count below 1.
    """
    if not isinstance(update, LowRank | SeedScalars | ProjectedGradient | Dense):
        raise ValueError(
            f"the family {update.family!r} is no change of weights yet: reconstruct it first"
        )
    if count < 1:
        raise ValueError(f"there is no pool of {count} probes")
    seeds = [fk.derive_seed(master_seed, k) for k in range(count)]
    layout = update.layout
    if isinstance(update, LowRank):
        found = update.project(seeds)
    else:
        found = _as_low_rank(update, names).project(seeds)
        for name in _touched(update):
            if name in found or not (names is None or name in names):
                continue
            dense = update.tensors[name] if isinstance(update, Dense) else update.dense_tensor(name)
            found[name] = probe_products(dense.double(), seeds, layout.tensor_id(name), "rank1")
    kept = sorted(found, key=layout.tensor_id)
    return {name: found[name] for name in kept if names is None or name in names}


def vector(found: Mapping[str, Tensor]) -> Tensor:
    """<change, z_k> over all tensors, float64 [count]: each tensor's coordinates, added."""
    parts = list(found.values())
    return torch.stack(parts).sum(dim=0) if parts else torch.zeros(0, dtype=torch.float64)


def _touched(update: SeedScalars | ProjectedGradient | Dense) -> Collection[str]:
    if isinstance(update, Dense):
        return update.tensors
    if isinstance(update, ProjectedGradient):
        return update.coordinates
    if len(update.indices) == 0:
        return ()
    return update.names or [spec.name for spec in update.layout]


def _as_low_rank(
    update: SeedScalars | ProjectedGradient | Dense, names: Collection[str] | None
) -> LowRank:
    """The matrices of an update along rank-1 probes, as U diag(a) V^T; nothing of any other."""
    layout = update.layout
    factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    if isinstance(update, SeedScalars | ProjectedGradient) and update.probe == "rank1":
        for name in _touched(update):
            if len(layout.shape(name)) != 2 or not (names is None or name in names):
                continue
            if isinstance(update, SeedScalars):
                seeds, weights = update.seeds, update.scalars
            else:
                values = update.coordinates[name]
                seeds = [fk.derive_seed(update.master_seed, k) for k in range(len(values))]
                weights = values / len(values)
            u, v = rank1_sides(layout.shape(name), seeds, layout.tensor_id(name))
            factors[name] = (u, v.T, weights)
    return LowRank(layout, factors)
