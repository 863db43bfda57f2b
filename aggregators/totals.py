"""Exact weighted sums of updates of one family: sum_i w_i u_i, whatever was added to what first.

A mean is one such sum, divided once. So a cohort whose members are summed elsewhere, by an edge
aggregator, gives the same bits as its members one by one: a total of totals is a total. Numbers are
summed in fixed point (``ExactNumbers``); factors are put side by side, and into one order when a mean is
made of them.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fedkernels as fk
from aggregators.dense import Dense
from aggregators.exact_numbers import ExactNumbers
from aggregators.factor_scalars import FactorScalars
from aggregators.low_rank import LowRank, stack
from aggregators.projected import ProjectedGradient
from aggregators.seed_scalars import SeedScalars
from aggregators.sketch import Sketch
from aggregators.update import Update

SCALARS = "scalars"


@dataclass(frozen=True)
class Total:
    """The sum of updates of one family (and one pool of probes), each times its weight.

    ``form``: of stacks the sum itself. Of other families an update whose numbers count for nothing: it
    says what the sum's numbers are of, and holds the statistics. ``numbers``: theirs, by part.
    ``held``: by tensor the weight of the members that have it; updates along one pool of seeds all
    reach the same tensors, and have none here.
    """

    form: Any
    weight: float
    numbers: Mapping[str, ExactNumbers] = field(default_factory=dict)
    held: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, update: Update, weight: float) -> Total:
        """One update times its weight. Raises ValueError for numbers beyond any that the gate admits."""
        held = dict.fromkeys(tensors_of(update), weight)
        if isinstance(update, LowRank):
            return cls(update * weight, weight, held=held)
        numbers = {k: ExactNumbers.of(v * weight) for k, v in vectors(update).items()}
        return cls(update, weight, numbers, held)

    @property
    def family(self) -> str:
        """The family of its members."""
        return str(self.form.family)

    @property
    def pool(self) -> int | None:
        """The seed of the probes, where updates of others cannot be added: of random projections."""
        return self.form.master_seed if isinstance(self.form, ProjectedGradient) else None

    def times(self, factor: float, more: Mapping[str, float] | None = None) -> Update:
        """The sum times a factor, and times what some tensors get beyond that (``beyond``).

        An update with the same bits for the same members.
        """
        own = more or {}
        if isinstance(self.form, LowRank):
            ordered = in_order(self.form)
            return LowRank(
                ordered.layout,
                {
                    name: (part.B, part.A, part.scale * (factor * own.get(name, 1.0)))
                    for name, part in ordered.factors.items()
                },
            )
        return with_vectors(
            self.form,
            {
                key: part.float64() * (factor * own.get(tensor_of(key), 1.0))
                for key, part in self.numbers.items()
            },
        )

    def mean(self) -> Update:
        """The weighted mean of its members; of each tensor over those that have it."""
        return self.times(1.0 / self.weight, beyond([self]))

    def compact(self) -> Total:
        """The same sum with no more rank components than a matrix has dimensions.

        Such a stack is the singular value decomposition of what was longer: it differs from the sum by
        what float32 rounds. Shorter ones, and other families, are left as they are.
        """
        if not isinstance(self.form, LowRank):
            return self
        layout, factors = self.form.layout, {}
        for name, parts in self.form.factors.items():
            factors[name] = (parts.B, parts.A, parts.scale)
            if parts.B.shape[1] > min(layout.shape(name)):
                u, sigma, vt = fk.stack_svd([factors[name]])
                factors[name] = (u, vt, sigma)
        kept = {name: part for name, part in factors.items() if len(part[2]) > 0}
        return Total(LowRank(layout, kept), self.weight, held=self.held)


def summed(totals: Sequence[Total]) -> Total:
    """The sum of totals, at least one, of one family and pool."""
    weight = math.fsum(total.weight for total in totals)
    forms = [total.form for total in totals]
    if isinstance(forms[0], LowRank):
        # One copy, where a chain of sums would copy every prefix.
        return Total(stack(forms), weight, held=_held(totals))
    form = functools.reduce(operator.add, forms)
    return Total(form, weight, _joined(form, totals), _held(totals))


def beyond(totals: Sequence[Total]) -> dict[str, float]:
    """By tensor that only some members of a family have: the family's weight over theirs.

    A sum over the family's weight, times this, is the mean over those members.
    """
    everyone = math.fsum(total.weight for total in totals)
    return {name: everyone / held for name, held in _held(totals).items() if held != everyone}


def tensors_of(update: Any) -> Collection[str]:
    """The tensors that an update names one by one; none of updates along one pool of seeds."""
    if isinstance(update, LowRank):
        return update.factors
    if isinstance(update, Dense):
        return update.tensors
    if isinstance(update, ProjectedGradient):
        return update.coordinates
    if isinstance(update, Sketch):
        return update.views.keys() | update.whole.keys()
    return ()


def tensor_of(key: str) -> str:
    """The tensor of a part of ``vectors``: views of a sketch are two parts."""
    return key[:-2] if key.endswith(("#P", "#R")) else key


def vectors(update: Any) -> dict[str, Tensor]:
    """The numbers that an update is linear in: float64 vectors by part, in one order of parts."""
    if isinstance(update, SeedScalars):
        return {SCALARS: update.scalars}
    if isinstance(update, FactorScalars):
        return {SCALARS: update.scalars.scalars}
    if isinstance(update, ProjectedGradient):
        return dict(update.coordinates)
    if isinstance(update, Sketch | Dense):
        return {name: tensor.flatten() for name, tensor in update.dense().items()}
    raise TypeError(f"no exact sum of the family {update.family!r}")


def with_vectors(form: Any, found: Mapping[str, Tensor]) -> Update:
    """The update that ``vectors`` takes apart, with other numbers and no statistics."""
    layout = form.layout
    if isinstance(form, SeedScalars):
        return SeedScalars(
            layout, form.master_seed, form.pool_size, form.indices, found[SCALARS], form.probe,
            form.names, None, form.reach,
        )  # fmt: skip
    if isinstance(form, FactorScalars):
        inner = with_vectors(form.scalars, found)
        assert isinstance(inner, SeedScalars)
        return FactorScalars(layout, form.names, form.rank, form.scale, form.shared_seed, inner)
    if isinstance(form, ProjectedGradient):
        return ProjectedGradient(layout, form.master_seed, found, form.probe)
    shaped = {name: found[name].reshape(tensor.shape) for name, tensor in form.dense().items()}
    if isinstance(form, Dense):
        return Dense(layout, shaped)
    views = {name: (shaped[f"{name}#P"], shaped[f"{name}#R"]) for name in form.views}
    return Sketch(layout, form.basis_digest, views, {name: shaped[name] for name in form.whole})


def in_order(update: LowRank) -> LowRank:
    """The same sum with the rank components of each tensor in the order of their contents."""
    factors = {}
    for name, parts in update.factors.items():
        rows = torch.cat([parts.B.double().T, parts.A.double(), parts.scale[:, None]], dim=1)
        digests = [hashlib.sha256(row.numpy().tobytes()).digest() for row in rows.contiguous()]
        order = torch.tensor(sorted(range(len(digests)), key=digests.__getitem__))
        factors[name] = (parts.B[:, order], parts.A[order], parts.scale[order])
    return LowRank(update.layout, factors)


def _joined(form: Any, totals: Sequence[Total]) -> dict[str, ExactNumbers]:
    """The numbers of totals added part by part; those along a pool by the seeds' indices."""
    found: dict[str, list[ExactNumbers]] = {}
    for total in totals:
        for key, part in total.numbers.items():
            placed = part
            if key == SCALARS:
                indices = _indices(form)
                placed = part.at(torch.searchsorted(indices, _indices(total.form)), len(indices))
            found.setdefault(key, []).append(placed)
    return {key: ExactNumbers.sum(parts) for key, parts in found.items()}


def _held(totals: Sequence[Total]) -> dict[str, float]:
    weights: dict[str, list[float]] = {}
    for total in totals:
        for name, weight in total.held.items():
            weights.setdefault(name, []).append(weight)
    return {name: math.fsum(some) for name, some in weights.items()}


def _indices(form: Any) -> Tensor:
    scalars = form.scalars if isinstance(form, FactorScalars) else form
    indices: Tensor = scalars.indices
    return indices
