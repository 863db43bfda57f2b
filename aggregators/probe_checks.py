"""What a plan allows of updates along probes: the pool, the count, and the size of every number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aggregators.basis import Basis
from aggregators.factor_scalars import FactorScalars
from aggregators.methods import FactorMethod, ProjectedMethod, ZerothOrderMethod
from aggregators.projected import ProjectedGradient
from aggregators.reach import Reach
from aggregators.seed_scalars import SeedScalars
from aggregators.sketch import Sketch
from aggregators.update import UpdateRejected, Verdict

# Beyond this no model survives the step, and the sum's integers would lose their finest digits.
LARGEST_NUMBER = 2.0**30


def check_scalars(
    update: SeedScalars, method: ZerothOrderMethod, names: Sequence[str] | None, steps: int
) -> None:
    """Refuse scalars of another pool than the plan's, and numbers that no walk makes.

    ``names``: the tensors that the plan's probes reach, None for all. ``steps``: of the plan.
    """
    scope = None if names is None else tuple(names)
    asked = (method.master_seed, method.pool_size, method.probe, scope, method.reach)
    if update.reach != method.reach:
        raise UpdateRejected(
            Verdict.POOL,
            f"probes of {_parts(update.reach)}, the plan asks for {_parts(method.reach)}",
        )
    if update.pool != asked:
        raise UpdateRejected(
            Verdict.POOL,
            f"pool of {update.pool_size} {update.probe} probes of seed {update.master_seed} over"
            f" {_extent(update.names)}, the plan asks for {method.pool_size} {method.probe} of"
            f" {method.master_seed} over {_extent(names)}",
        )
    _check_numbers(update.scalars, "scalar")
    _check_statistics(update, method, steps)


def check_factors(update: FactorScalars, method: FactorMethod, names: Sequence[str]) -> None:
    """Refuse scalars along probes of other factors than the plan's, beside another A."""
    if update.names != tuple(names):
        raise UpdateRejected(
            Verdict.UNKNOWN_TENSOR,
            f"factors of {len(update.names)} tensors, not of the {len(names)} that the plan adapts",
        )
    if update.rank != method.rank:
        raise UpdateRejected(Verdict.RANK, f"rank {update.rank}, the plan asks for {method.rank}")
    if (update.scale, update.shared_seed) != (method.scale, method.shared_seed):
        raise UpdateRejected(
            Verdict.POOL,
            f"factors beside the A of {update.shared_seed} at scale {update.scale:g}, the plan asks for"
            f" {method.shared_seed} at {method.scale:g}",
        )


def _check_statistics(update: SeedScalars, method: ZerothOrderMethod, steps: int) -> None:
    """Refuse statistics that were not asked for, of another bound, or of more than was measured."""
    found = update.statistics
    if method.sampling == "uniform":
        if found is not None:
            raise UpdateRejected(
                Verdict.MALFORMED, "statistics came that the plan does not ask for"
            )
        return
    if found is None:
        raise UpdateRejected(Verdict.MALFORMED, "the plan asks for statistics, and none came")
    if found.bound != method.clip:
        raise UpdateRejected(
            Verdict.POOL,
            f"statistics of slopes cut to {found.bound:g}, the plan cuts them to {method.clip:g}",
        )
    measured, asked = int(found.counts.sum()), steps * min(method.directions, method.pool_size)
    if measured > asked:
        raise UpdateRejected(
            Verdict.OVERFLOW, f"statistics of {measured} measurements, the plan asks for {asked}"
        )


def check_coordinates(update: ProjectedGradient, method: Any) -> None:
    """Refuse projections on other probes, of other tensors or counts than the plan's."""
    assert isinstance(method, ProjectedMethod)
    if (update.master_seed, update.probe) != (method.master_seed, method.probe):
        raise UpdateRejected(
            Verdict.POOL,
            f"{update.probe} probes of seed {update.master_seed}, the plan asks for {method.probe} of"
            f" {method.master_seed}",
        )
    for name, values in update.coordinates.items():
        wanted = method.coordinates.get(name)
        if wanted is None:
            raise UpdateRejected(
                Verdict.UNKNOWN_TENSOR, f"layer {name!r} is not one that the plan projects"
            )
        if len(values) != wanted:
            raise UpdateRejected(
                Verdict.SHAPE, f"layer {name!r}: {len(values)} coordinates, not {wanted}"
            )
        _check_numbers(values, f"layer {name!r}: coordinate")
    # A node that trains a subset has no change of the other tensors, and which they are it decides.
    missing = sorted(method.coordinates.keys() - update.coordinates.keys())
    if missing and method.subset == "all":
        raise UpdateRejected(Verdict.SHAPE, f"layer {missing[0]!r} has no coordinates")


def check_sketch(update: Sketch, basis: Basis | None) -> None:
    """Refuse sketches in another basis than the round's."""
    if basis is None:
        raise UpdateRejected(Verdict.WRONG_BASIS, "a sketch, and the round has no basis")
    basis.check(update)


def _parts(reach: Reach) -> str:
    return f"{reach.blocks} blocks and a density of {reach.density:g}"


def _extent(names: Sequence[str] | None) -> str:
    return "all tensors" if names is None else f"{len(names)} tensors"


def _check_numbers(values: Tensor, what: str) -> None:
    """Finite they are already: no update along probes can be made of other numbers."""
    sizes = values.abs()
    if not len(sizes):
        return
    if bool(((sizes > 0) & (sizes < torch.finfo(torch.float32).tiny)).any()):
        raise UpdateRejected(Verdict.NOT_FINITE, f"a {what} is denormal")
    largest = float(sizes.max())
    if largest > LARGEST_NUMBER:
        raise UpdateRejected(
            Verdict.OVERFLOW, f"the {what} {largest:.4g} exceeds the limit of {LARGEST_NUMBER:g}"
        )
