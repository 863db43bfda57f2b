"""Weighted sums of updates: exact within a family, and families add."""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from aggregators.codec import encode
from aggregators.dense import Dense
from aggregators.factor_scalars import FactorScalars
from aggregators.layout import Layout
from aggregators.low_rank import LowRank, stack
from aggregators.pair import parts_of
from aggregators.projected import ProjectedGradient
from aggregators.seed_scalars import SeedScalars
from aggregators.sketch import Sketch
from aggregators.update import Update, require_layout

Weighted = tuple[Any, float]

FAMILIES = tuple(
    kind.family for kind in (LowRank, SeedScalars, FactorScalars, ProjectedGradient, Sketch, Dense)
)


@dataclass(frozen=True)
class Aggregate:
    """One update per family; ``shares`` are the weights that the inputs got, in input order: of a
    tensor that some of a family do not have, the others got more.

    Projections on probes of several seeds cannot be added by coordinate: there is one a seed then, under
    "projected_gradient/" and the seed.
    """

    updates: dict[str, Update]
    shares: list[float]
    layout: Layout

    def dense(self, layout: Layout | None = None) -> dict[str, Tensor]:
        """The whole change as float64 tensors; of a sketch, which is none yet, its coordinates."""
        require_layout(layout or self.layout, self.layout)
        total: dict[str, Tensor] = {}
        for _, update in sorted(self.updates.items()):
            for name, change in update.dense().items():
                total[name] = total[name] + change if name in total else change
        return total


def aggregate(
    updates: Sequence[Weighted],
    layout: Layout,
    mixing: Literal["add", "mean"] = "add",
    family_weights: Mapping[str, float] | None = None,
) -> Aggregate:
    """The weighted sum of updates, the same bits in whatever order they come.

    "add": sum over families f of lambda_f * (weighted mean within f), lambda_f = 1 by default. The mean
    of a tensor is over the updates of the family that have it: a hybrid node, whose plan gives LoRA the
    upper layers alone, says nothing of the lower ones. One mean over all nodes ("mean") divides by all
    weights, hence the strong families' steps by the share of the weak ones. Both parts of a pair have
    the node's weight, each in its family; its share is the sum of theirs.
    Raises ValueError for no updates, for weights that are not positive and finite, for another layout,
    for family weights that are not finite or name no family.
    """
    if not updates:
        raise ValueError("there are no updates to aggregate")
    if mixing not in ("add", "mean"):
        raise ValueError(f"mixing {mixing!r} is neither 'add' nor 'mean'")
    everyone = _total_weight(updates, layout)
    lambdas = dict(family_weights or {})
    if unknown := sorted(lambdas.keys() - FAMILIES):
        raise ValueError(f"family_weights names {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    if not all(math.isfinite(value) for value in lambdas.values()):
        raise ValueError(f"family weights {lambdas} are not all finite")
    groups: dict[str, list[tuple[int, Any]]] = {}
    for index, (update, _) in enumerate(updates):
        for part in parts_of(update):
            groups.setdefault(part.family, []).append((index, part))
    shares = [0.0] * len(updates)
    totals: dict[str, Update] = {}
    for family, members in sorted(groups.items()):
        within = math.fsum(updates[index][1] for index, _ in members)
        divisor = within if mixing == "add" else everyone
        weighted = [
            (part, lambdas.get(family, 1.0) * updates[index][1] / divisor)
            for index, part in members
        ]
        for (index, _), (_, share) in zip(members, weighted, strict=True):
            shares[index] += share
        parts = [(part, updates[index][1]) for index, part in members]
        extra = _without_others(parts) if mixing == "add" else {}
        scaled = [_scaled(update, share, extra) for update, share in _canonical_order(weighted)]
        totals |= {key: _total(some) for key, some in _by_pool(family, scaled).items()}
    return Aggregate(totals, shares, layout)


def average_factors(updates: Sequence[tuple[LowRank, float]], rank: int) -> LowRank:
    """FedIT done correctly: zero-pad to ``rank``, then average B and A separately.

    The product of the averages has cross terms B_i A_j that no node computed; this is the baseline,
    not the rule. Scales are folded into B; a tensor that a node leaves out counts as zeros. The
    result has scale 1 and the same bits in whatever order the updates come. Raises ValueError as
    ``aggregate`` does, and for a node's rank above ``rank``.
    """
    if not updates:
        raise ValueError("there are no updates to average")
    layout = updates[0][0].layout
    total = _total_weight(updates, layout)
    means: dict[str, tuple[Tensor, Tensor, float]] = {}
    ordered = _canonical_order(updates)
    names = {name for update, _ in updates for name in update.factors}
    for name in sorted(names, key=layout.tensor_id):
        rows, columns = layout.shape(name)
        mean_b = torch.zeros(rows, rank, dtype=torch.float64)
        mean_a = torch.zeros(rank, columns, dtype=torch.float64)
        for update, weight in ordered:
            if name not in update.factors:
                continue
            if update.rank(name) > rank:
                raise ValueError(f"layer {name!r}: rank {update.rank(name)} is above {rank}")
            factors = update.factors[name]
            width = factors.B.shape[1]
            mean_b[:, :width] += (weight / total) * factors.B.double() * factors.scale
            mean_a[:width] += (weight / total) * factors.A.double()
        means[name] = (mean_b.float(), mean_a.float(), 1.0)
    return LowRank(layout, means)


def _without_others(members: Sequence[Weighted]) -> dict[str, float]:
    """By tensor that only some members of a family have: the family's weight over theirs.

    Updates along one pool of seeds all reach the same tensors.
    """
    found = {}
    held: dict[str, list[float]] = {}
    for update, weight in members:
        for name in _tensors(update):
            held.setdefault(name, []).append(weight)
    for name, weights in held.items():
        if len(weights) < len(members):
            found[name] = math.fsum(weight for _, weight in members) / math.fsum(weights)
    return found


def _tensors(update: Any) -> Collection[str]:
    if isinstance(update, LowRank):
        return update.factors
    if isinstance(update, Dense):
        return update.tensors
    if isinstance(update, ProjectedGradient):
        return update.coordinates
    if isinstance(update, Sketch):
        return update.views.keys() | update.whole.keys()
    return ()


def _scaled(update: Any, share: float, extra: Mapping[str, float]) -> Any:
    """The update times its share, and times what its tensors get beyond that."""
    groups: dict[float, list[str]] = {}
    for name in _tensors(update):
        groups.setdefault(extra.get(name, 1.0), []).append(name)
    if len(groups) < 2:
        return update * (share * next(iter(groups), 1.0))
    parts = [update.only(set(names)) * (share * more) for more, names in sorted(groups.items())]
    return functools.reduce(operator.add, parts)


def _by_pool(family: str, updates: Sequence[Any]) -> dict[str, list[Any]]:
    """Updates that add: all of a family, but projections by the seed of their probes."""
    pools = {update.master_seed for update in updates if isinstance(update, ProjectedGradient)}
    if len(pools) < 2:
        return {family: list(updates)}
    return {
        f"{family}/{seed}": [update for update in updates if update.master_seed == seed]
        for seed in sorted(pools)
    }


def _total(updates: list[Any]) -> Update:
    if isinstance(updates[0], LowRank):
        return stack(updates)  # one copy, where a chain of sums would copy every prefix
    total: Update = functools.reduce(operator.add, updates)
    return total


def _total_weight(updates: Sequence[Weighted], layout: Layout) -> float:
    for update, weight in updates:
        require_layout(update.layout, layout)
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight {weight!r} is not a positive number")
    return math.fsum(weight for _, weight in updates)


def _canonical_order(updates: Sequence[Weighted]) -> list[Weighted]:
    """Content decides the order of summation, so the order of arrival cannot."""
    if len(updates) < 2:
        return list(updates)
    return sorted(updates, key=lambda item: (hashlib.sha256(encode(item[0])).digest(), item[1]))
