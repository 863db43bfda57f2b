"""What an edge's plan allows of its sum: who is in it, with what weight, and what numbers.

The root does not see the members' updates, so it trusts an edge to add what it says that it added. It
does check that the members are those that were asked, that what they were asked for is there and
weighs what they do, and that the mean of each family is an update that their plans allow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aggregators.basis import Basis
from aggregators.cohort import Cohort, CohortMember
from aggregators.factor_scalars import FactorScalars
from aggregators.layout import Layout
from aggregators.low_rank import LowRank
from aggregators.methods import (
    CohortGroup,
    CohortMethod,
    FirstOrderMethod,
    HybridMethod,
    LoraMethod,
    ProjectedMethod,
    SketchMethod,
)
from aggregators.probe_checks import check_coordinates, check_factors, check_scalars, check_sketch
from aggregators.projected import ProjectedGradient
from aggregators.seed_scalars import SeedScalars
from aggregators.sketch import Sketch
from aggregators.targets import match_targets, trained_names
from aggregators.totals import Total, beyond
from aggregators.update import Update, UpdateRejected, Verdict

Key = tuple[str, int | None]


def check_cohort(
    cohort: Cohort,
    method: CohortMethod,
    examples: int,
    layout: Layout,
    basis: Basis | None,
    max_examples: int,
) -> list[Update]:
    """Refuse a cohort that its plan did not ask for. ``examples``: of the edge's report.

    Returns each total over its weight: a tensor that some members lack counts as zeros there, so that
    no such mean is longer than the longest member.
    """
    members = {member.node: member for member in cohort.members}
    _check_members(members, method, examples, max_examples)
    asked: dict[Key, list[_Asked]] = {}
    for group in method.groups:
        if group.action != "train":
            continue
        weights = [m.examples for m in _of(group, members) if m.verdict is Verdict.ACCEPTED]
        for part in _parts(group.method):
            key = (part.family, part.master_seed if isinstance(part, ProjectedMethod) else None)
            asked.setdefault(key, []).append(_Asked(group, part, weights))
    found = {(total.family, total.pool): total for total in cohort.totals}
    for key, total in found.items():
        if key not in asked:
            raise UpdateRejected(
                Verdict.WRONG_FAMILY,
                f"a total of the family {total.family!r}, which no plan asks for",
            )
    for key, some in asked.items():
        weight = sum(sum(one.weights) for one in some)
        if weight and key not in found:
            raise UpdateRejected(
                Verdict.MALFORMED, f"members sent updates of {key[0]!r}, and no total has them"
            )
        if key in found and weight != found[key].weight:
            raise UpdateRejected(
                Verdict.WEIGHT,
                f"the total of {key[0]!r} weighs {found[key].weight:g}, its members {weight:g}",
            )
    for key, total in found.items():
        _check_held(total, asked[key], layout, basis)
    try:
        means = [
            total.times(1.0 / total.weight) if beyond([total]) else mean
            for total, mean in zip(cohort.totals, cohort.means, strict=True)
        ]
    except ValueError as error:
        raise UpdateRejected(Verdict.MALFORMED, str(error)) from None
    for (key, total), mean in zip(found.items(), means, strict=True):
        _check_mean(total, mean, asked[key], layout, basis)
    return means


@dataclass(frozen=True)
class _Asked:
    """A group that was asked for updates of a family, and the examples of those that sent some."""

    group: CohortGroup
    method: Any
    weights: Sequence[int]


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
        if not member.payload:
            raise UpdateRejected(
                Verdict.MALFORMED, f"{member.node!r} is in the sum, and no update of it is named"
            )
    for group in method.groups:
        for member in _of(group, members) if group.action != "train" else ():
            if member.payload:
                raise UpdateRejected(
                    Verdict.WRONG_FAMILY, f"{member.node!r}: an update came with an evaluation"
                )
    if sum(member.examples for member in accepted) != examples:
        raise UpdateRejected(
            Verdict.WEIGHT, f"{examples} examples are not the sum of the members' that are in it"
        )


def _check_held(total: Total, asked: Sequence[_Asked], layout: Layout, basis: Basis | None) -> None:
    """Refuse weights by tensor that are not those of the members whose plans reach it.

    Of a tensor that plans leave to a node's choice of a subset it may be the weight of some of them.
    """
    least: dict[str, int] = {}
    most: dict[str, int] = {}
    for one in asked:
        free = isinstance(one.method, FirstOrderMethod) and one.method.subset != "all"
        weight = sum(one.weights)
        for name in _reached(one.method, layout, basis) if weight else ():
            least[name] = least.get(name, 0) + (0 if free else weight)
            most[name] = most.get(name, 0) + weight
    if odd := total.held.keys() - most.keys():
        raise UpdateRejected(
            Verdict.UNKNOWN_TENSOR, f"layer {min(odd)!r} is not one that members' plans reach"
        )
    for name, limit in most.items():
        held = total.held.get(name, 0)
        if not least[name] <= held <= limit:
            raise UpdateRejected(
                Verdict.WEIGHT,
                f"layer {name!r}: those that have it weigh {held:g}, and not {least[name]} to {limit}",
            )


def _reached(method: Any, layout: Layout, basis: Basis | None) -> Collection[str]:
    """The tensors that an update of a method names one by one."""
    if isinstance(method, LoraMethod):
        return match_targets(layout, method.target_modules, method.layers)
    if isinstance(method, ProjectedMethod):
        return method.coordinates
    if isinstance(method, SketchMethod) and basis is not None:
        return basis.names
    return ()


def _check_mean(
    total: Total, mean: Any, asked: Sequence[_Asked], layout: Layout, basis: Basis | None
) -> None:
    method = asked[0].method
    # The mean of updates has no statistics; those of the sum may be of all measurements.
    steps = sum(one.group.local_steps * len(one.group.members) for one in asked)
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


def _check_stack(mean: LowRank, asked: Sequence[_Asked], layout: Layout) -> None:
    """Names, and ranks of no more than the members' together or the matrix has."""
    limits: dict[str, int] = {}
    for one in asked:
        rank = one.method.rank * (2 if one.method.sends == "delta" else 1) * len(one.group.members)
        for name in match_targets(layout, one.method.target_modules, one.method.layers):
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
