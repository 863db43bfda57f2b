"""The global model as the server holds it: the carry, sums along probes, and FedIT's adapter.

A state is a value: a round turns one state and the accepted updates into the next.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aggregators import (
    Basis,
    Carry,
    Dense,
    FactorScalars,
    Layout,
    LowRank,
    ProjectedGradient,
    SeedScalars,
    Sketch,
    Update,
    aggregate,
    average_factors,
    decode,
    encode,
    gram,
    overlap_weights,
)
from aggregators.codec import pack, unpack
from aggregators.cohort import Cohort
from aggregators.pair import parts_of
from aggregators.presets import PRESETS, Preset
from aggregators.probe_sum import ProbeSum
from aggregators.seed_statistics import SeedStatistics
from aggregators.view import View, read_view, view_parts
from fedserver.configuration import RunConfiguration
from fedserver.planner import basis_seed, trained

ZEROTH_ORDER_FAMILY = {"weights": SeedScalars.family, "lora": FactorScalars.family}
PROJECTED_FAMILY = {"adaptive": Sketch.family, "random": ProjectedGradient.family}
# Of the learning rate: the finest step of a scalar that a run's sum tells apart.
STEP_BITS = 18


@dataclass(frozen=True)
class Mixed:
    """How a round's updates came together, as its ledger entry tells it.

    ``shares``: the weight of each update, in their order. ``weights``: lambda of each family.
    ``cosines``: between the changes of two families, "one, other"; measured where weights adapt.
    """

    shares: list[float]
    weights: dict[str, float]
    cosines: dict[str, float]


@dataclass(frozen=True)
class GlobalModel:
    """``carry``: the exact running sum of all low-rank change. ``sums``: of all change along probes.

    ``adapter``: FedIT's averaged factors, or None. ``whole``: small tensors' change, element by element.
    ``basis``: what the next round's sketches are seen through, None before the first. ``statistics``:
    what was measured along the pool's seeds, where the run draws seeds by it.
    """

    carry: Carry
    adapter: LowRank | None = None
    sums: tuple[ProbeSum, ...] = ()
    whole: Dense | None = None
    basis: Basis | None = None
    statistics: SeedStatistics | None = None

    @classmethod
    def empty(cls, layout: Layout) -> GlobalModel:
        """The base model: no change yet."""
        return cls(Carry.empty(layout))

    def to_bytes(self) -> bytes:
        """Deterministic bytes of the whole state; ``from_bytes`` inverts them exactly."""
        parts = {"carry": self.carry.to_bytes()}
        if self.adapter is not None:
            parts["adapter"] = encode(self.adapter)
        rest = View(sums=self.sums, whole=self.whole, basis=self.basis)
        if rest != View():
            parts["rest"] = pack(*view_parts(rest, None))
        if self.statistics is not None:
            parts["statistics"] = pack(*self.statistics.parts())
        header = {"state": {name: len(part) for name, part in sorted(parts.items())}}
        return pack(header, {}) + b"".join(part for _, part in sorted(parts.items()))

    @classmethod
    def from_bytes(cls, data: bytes, layout: Layout) -> GlobalModel:
        """Read a state that ``to_bytes`` wrote; the caller has checked its digest."""
        prefix = 8 + int.from_bytes(data[:8], "little")
        header, _ = unpack(data[:prefix])
        parts, start = {}, prefix
        for name, size in sorted(header["state"].items()):
            parts[name] = data[start : start + size]
            start += size
        adapter = decode(parts["adapter"], layout) if "adapter" in parts else None
        assert adapter is None or isinstance(adapter, LowRank)
        rest = read_view(*unpack(parts["rest"]), layout) if "rest" in parts else View()
        carry = Carry.from_bytes(parts["carry"], layout)
        statistics = None
        if "statistics" in parts:
            statistics = SeedStatistics.from_parts(*unpack(parts["statistics"]))
        return cls(carry, adapter, rest.sums, rest.whole, rest.basis, statistics)

    def digest(self) -> str:
        """SHA-256 of ``to_bytes``."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def view(self, preset: Preset, rank: int, view_rank: int | None, energy: float | None) -> View:
        """What a LoRA node of ``rank`` gets to see of this state (docstring of ``Preset``)."""
        return self._seen(self._adapter_for(preset, rank, view_rank, energy))

    def common_view(self, preset: Preset, view_rank: int | None, energy: float | None) -> View:
        """The one view that is evaluated and exported: the same for every node.

        Averaged factors are no larger than the largest node's, so nothing is cut off them.
        """
        if self.adapter is not None:
            return self._seen(self.adapter)
        if preset.view == "whole":
            return self._seen(self.carry.head(None, None))
        return self._seen(self.carry.head(view_rank, energy))

    def _seen(self, adapter: LowRank) -> View:
        return View(adapter if adapter.factors else None, self.sums, self.whole)

    def _adapter_for(
        self, preset: Preset, rank: int, view_rank: int | None, energy: float | None
    ) -> LowRank:
        if preset.view == "whole":
            return self.carry.head(None, None)
        if preset.view == "capped":
            return self.carry.head(view_rank, energy)
        if self.adapter is not None:
            return first_components(self.adapter, rank)
        return self.carry.head(rank, None)


def first_basis(configuration: RunConfiguration, layout: Layout) -> Basis | None:
    """What the first sketches of a run are seen through; None where it asks for none."""
    for node in configuration.nodes:
        if configuration.strand(node.name) == "projected" and configuration.basis == "adaptive":
            break
    else:
        return None
    settings = configuration.projected
    names = trained(layout, settings.target_modules)
    seed = basis_seed(configuration)
    return Basis.random(layout, names, seed, settings.rank, settings.oversampling)


def next_model(
    model: GlobalModel,
    updates: Sequence[tuple[Update | Cohort, int]],
    configuration: RunConfiguration,
) -> tuple[GlobalModel, Mixed]:
    """Fold one round's accepted updates, each with its example count, into the state."""
    layout = model.carry.layout
    if PRESETS[configuration.preset].server == "average_factors":
        factors = [(u, n) for u, n in updates if isinstance(u, LowRank)]
        adapter = average_factors(factors, configuration.largest_rank())
        total = sum(examples for _, examples in updates)
        shares = [examples / total for _, examples in updates]
        return GlobalModel(Carry.empty(layout).add(adapter), adapter), Mixed(shares, {}, {})
    mixing = configuration.mixing
    means = aggregate(list(updates), layout, "mean" if mixing.rule == "mean" else "add")
    changes: dict[str, _Change] = {}
    for key, mean in means.updates.items():
        # Projections along probes of several seeds are several updates of one family.
        family, found = key.partition("/")[0], _change(mean, model, configuration)
        known = changes.get(family, _Change([]))
        changes[family] = _Change([*known.parts, *found.parts], found.basis)
    weights, cosines = dict.fromkeys(changes, 1.0), {}
    counted = [_examples(update, count) for update, count in updates]
    examples: Counter[str] = Counter()
    for counts in counted:
        examples.update(counts)
    if mixing.rule == "overlap" and len(changes) > 1:
        products = gram([change.parts for change in changes.values()], layout)
        chosen = overlap_weights(products, [examples[family] for family in changes])
        weights, cosines = (
            dict(zip(changes, chosen, strict=True)),
            _cosines(products, list(changes)),
        )
    families = {
        "lora": LowRank.family,
        "zeroth-order": ZEROTH_ORDER_FAMILY[configuration.zeroth_order.trains],
        "projected": PROJECTED_FAMILY[configuration.basis],
    }
    for strand, factor in mixing.weights.items():
        if families[strand] in weights:
            weights[families[strand]] *= factor
    following = model
    for family, change in changes.items():
        factor = weights[family] * configuration.server_learning_rate
        for part in change.parts:
            following = _with(following, part if factor == 1.0 else part * factor, configuration)
        if change.basis is not None:
            following = replace(following, basis=change.basis)
    everyone = sum(count for _, count in updates)
    shares = [
        sum(
            weights[family] * count / (everyone if mixing.rule == "mean" else examples[family])
            for family, count in counts.items()
        )
        for counts in counted
    ]
    return _with_statistics(following, updates), Mixed(shares, weights, cosines)


@dataclass(frozen=True)
class _Change:
    """A family's mean as changes of the weights, and the basis that it leads to."""

    parts: list[Update]
    basis: Basis | None = None


def _change(mean: Update, model: GlobalModel, configuration: RunConfiguration) -> _Change:
    if isinstance(mean, Sketch):
        basis = model.basis or first_basis(configuration, mean.layout)
        assert basis is not None, "a sketch, and no node was asked for one"
        read = mean.reconstruct(basis, configuration.projected.within)
        parts: list[Update] = [read] if read.factors else []
        if mean.whole:
            parts.append(mean.whole_change())
        return _Change(parts, basis.refined(mean))
    if isinstance(mean, ProjectedGradient) and configuration.projected.scale == "mmse":
        return _Change([mean.shrunk()])
    return _Change([mean])


def _cosines(products: Tensor, families: list[str]) -> dict[str, float]:
    """To four digits: they are for readers, and the last bits are a machine's own."""
    lengths = products.diagonal().clamp_min(torch.finfo(products.dtype).tiny).sqrt()
    cosines = products / lengths / lengths[:, None]
    return {
        f"{families[one]}, {families[two]}": round(float(cosines[one, two]), 4)
        for one, two in itertools.combinations(range(len(families)), 2)
    }


def _with(model: GlobalModel, change: Update, configuration: RunConfiguration) -> GlobalModel:
    """The state with one family's change of a round, or a part of it."""
    if isinstance(change, LowRank):
        return replace(model, carry=model.carry.add(change))
    if isinstance(change, Dense):
        return replace(model, whole=change if model.whole is None else model.whole + change)
    if isinstance(change, FactorScalars):
        return replace(model, carry=model.carry.add(change.low_rank()))
    if isinstance(change, SeedScalars):
        return replace(model, sums=_with_scalars(model.sums, change, configuration))
    if isinstance(change, ProjectedGradient):
        return replace(model, sums=(*model.sums, ProbeSum.of_projection(change)))
    raise TypeError(f"no state for the family {change.family!r}")


def _with_scalars(
    sums: tuple[ProbeSum, ...], change: SeedScalars, configuration: RunConfiguration
) -> tuple[ProbeSum, ...]:
    """The pool's sum with one round's scalars; a run has one pool, and it stands first."""
    layout, seed, size, probe = change.layout, change.master_seed, change.pool_size, change.probe
    if sums and sums[0].is_of(change):
        return (sums[0].add(change), *sums[1:])
    exponent = math.frexp(configuration.zeroth_order.learning_rate)[1] - STEP_BITS
    pool = ProbeSum.pool(layout, seed, size, probe, exponent, change.names, change.reach)
    return (pool.add(change), *sums)


def _examples(update: Update | Cohort, count: int) -> dict[str, int]:
    """By family, the examples that stand behind an update."""
    if not isinstance(update, Cohort):
        return {part.family: count for part in parts_of(update)}
    found: Counter[str] = Counter()
    for total in update.totals:
        found[total.family] += int(total.weight)
    return dict(found)


def _with_statistics(
    model: GlobalModel, updates: Sequence[tuple[Update | Cohort, int]]
) -> GlobalModel:
    """The state with what this round's nodes measured, each measurement counting alike."""
    known = model.statistics
    for update, _ in updates:
        parts = parts_of(update)
        if isinstance(update, Cohort):
            parts = tuple(total.form for total in update.totals)
        for part in parts:
            found = part.statistics if isinstance(part, (SeedScalars, FactorScalars)) else None
            if found is not None:
                known = found if known is None else known + found
    return replace(model, statistics=known)


def first_components(adapter: LowRank, rank: int) -> LowRank:
    """The first ``rank`` rank components of every tensor: how HetLoRA shrinks a global adapter."""
    return LowRank(
        adapter.layout,
        {
            name: (factors.B[:, :rank], factors.A[:rank], factors.scale[:rank])
            for name, factors in adapter.factors.items()
        },
    )
