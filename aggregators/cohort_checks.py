"""What an edge's plan allows of its sum: who is in it, with what weight, and what numbers.

The root does not see the members' updates, so it trusts an edge to add what it says that it added. It
does check that the members are those that were asked, that each total weighs what its members do, and
that the mean of each family is an update that the members' plans allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from aggregators.basis import Basis
from aggregators.cohort import Cohort, CohortMember
from aggregators.factor_scalars import FactorScalars
from aggregators.layout import Layout
from aggregators.low_rank import LowRank
from aggregators.methods import CohortGroup, CohortMethod, HybridMethod, LoraMethod, ProjectedMethod
from aggregators.probe_checks import check_coordinates, check_factors, check_scalars, check_sketch
from aggregators.projected import ProjectedGradient
from aggregators.seed_scalars import SeedScalars
from aggregators.sketch import Sketch
from aggregators.targets import match_targets, trained_names
from aggregators.totals import Total
from aggregators.update import UpdateRejected, Verdict

Key = tuple[str, int | None]


def check_cohort(
    cohort: Cohort,
    method: CohortMethod,
    examples: int,
    layout: Layout,
    basis: Basis | None,
    max_examples: int,
) -> None:
    """Refuse a cohort that its plan did not ask for. ``examples``: of the edge's report."""
    members = {member.node: member for member in cohort.members}
    _check_members(members, method, examples, max_examples)
    asked: dict[Key, list[tuple[CohortGroup, Any]]] = {}
    weights: dict[Key, list[int]] = {}
    for group in method.groups:
        if group.action != "train":
            continue
        accepted = [m for m in _of(group, members) if m.verdict is Verdict.ACCEPTED]
        for part in _parts(group.method):
            key = (part.family, part.master_seed if isinstance(part, ProjectedMethod) else None)
            asked.setdefault(key, []).append((group, part))
            weights.setdefault(key, []).extend(member.examples for member in accepted)
    for total, mean in zip(cohort.totals, cohort.means, strict=True):
        key = (total.family, total.pool)
        if key not in asked:
            raise UpdateRejected(
                Verdict.WRONG_FAMILY,
                f"a total of the family {total.family!r}, which no plan asks for",
            )
        if math.fsum(weights[key]) != total.weight:
            raise UpdateRejected(
                Verdict.WEIGHT,
                f"the total of {total.family!r} weighs {total.weight:g}, its members"
                f" {math.fsum(weights[key]):g}",
            )
        _check_mean(total, mean, asked[key], layout, basis)


def _check_members(
    members: Mapping[str, CohortMember], method: CohortMethod, examples: int, max_examples: int
) -> None:
    if members.keys() != set(method.names):
        odd = min(members.keys() ^ set(method.names))
        text = "was not asked" if odd in members else "was asked, and is not named"
        raise UpdateRejected(Verdict.WRONG_NODE, f"{odd[:64]!r} {text}")
    trained = [m for group in method.groups if group.action == "train" for m in _of(group, members)]
    accepted = [member for member in trained if member.verdict is Verdict.ACCEPTED]
    for member in accepted:
        if not 0 < member.examples <= max_examples:
            raise UpdateRejected(
                Verdict.WEIGHT,
                f"{member.node!r}: {member.examples} examples are not within 1 and {max_examples}",
            )
    if sum(member.examples for member in accepted) != examples:
        raise UpdateRejected(
            Verdict.WEIGHT, f"{examples} examples are not the sum of the members' that are in it"
        )


def _check_mean(
    total: Total,
    mean: Any,
    asked: Sequence[tuple[CohortGroup, Any]],
    layout: Layout,
    basis: Basis | None,
) -> None:
    method = asked[0][1]
    # The mean of updates has no statistics; those of the sum may be of all measurements.
    steps = sum(group.local_steps * len(group.members) for group, _ in asked)
    if isinstance(mean, LowRank):
        _check_stack(mean, asked, layout)
    elif isinstance(mean, SeedScalars):
        mean.statistics = total.form.statistics
        names = trained_names(layout, method.target_modules, method.layers)
        check_scalars(mean, method, names if len(names) < len(layout) else None, steps)
    elif isinstance(mean, FactorScalars):
        mean.scalars.statistics = total.form.statistics
        check_factors(mean, method, trained_names(layout, method.target_modules, method.layers))
        check_scalars(mean.scalars, method, None, steps)
    elif isinstance(mean, ProjectedGradient):
        check_coordinates(mean, method)
    elif isinstance(mean, Sketch):
        check_sketch(mean, basis)


def _check_stack(
    mean: LowRank, asked: Sequence[tuple[CohortGroup, LoraMethod]], layout: Layout
) -> None:
    """Names, and ranks of no more than the members' together or the matrix has."""
    limits: dict[str, int] = {}
    for group, method in asked:
        rank = method.rank * (2 if method.sends == "delta" else 1) * len(group.members)
        for name in match_targets(layout, method.target_modules, method.layers):
            limits[name] = limits.get(name, 0) + rank
    for name, rank in mean.ranks.items():
        if name not in limits:
            raise UpdateRejected(
                Verdict.UNKNOWN_TENSOR, f"layer {name!r} is not one that the plans adapt"
            )
        limit = min(limits[name], *layout.shape(name))
        if rank > limit:
            raise UpdateRejected(
                Verdict.RANK, f"layer {name!r}: rank {rank} exceeds the plans' {limit}"
            )


def _of(group: CohortGroup, members: Mapping[str, CohortMember]) -> list[CohortMember]:
    return [members[name] for name, _, _ in group.members]


def _parts(method: Any) -> tuple[Any, ...]:
    return (method.lower, method.upper) if isinstance(method, HybridMethod) else (method,)
