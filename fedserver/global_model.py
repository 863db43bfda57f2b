"""The global model as the server holds it: the carry, sums along probes, and FedIT's adapter.

A state is a value: a round turns one state and the accepted updates into the next.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aggregators import (
    Basis,
    Carry,
    Dense,
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
)
from aggregators.codec import pack, unpack
from aggregators.presets import PRESETS, Preset
from aggregators.probe_sum import ProbeSum
from aggregators.view import View, read_view, view_parts
from fedserver.configuration import RunConfiguration
from fedserver.planner import basis_seed, trained

FAMILY_OF = {
    "lora": LowRank.family,
    "zeroth-order": SeedScalars.family,
}
PROJECTED_FAMILY = {"adaptive": Sketch.family, "random": ProjectedGradient.family}
# Of the learning rate: the finest step of a scalar that a run's sum tells apart.
STEP_BITS = 16


@dataclass(frozen=True)
class GlobalModel:
    """``carry``: the exact running sum of all low-rank change. ``sums``: of all change along probes.

    ``adapter``: FedIT's averaged factors, or None. ``whole``: small tensors' change, element by element.
    ``basis``: what the next round's sketches are seen through, None before the first.
    """

    carry: Carry
    adapter: LowRank | None = None
    sums: tuple[ProbeSum, ...] = ()
    whole: Dense | None = None
    basis: Basis | None = None

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
        return cls(carry, adapter, rest.sums, rest.whole, rest.basis)

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
    updates: Sequence[tuple[Update, int]],
    configuration: RunConfiguration,
) -> tuple[GlobalModel, list[float]]:
    """Fold one round's accepted updates, each with its example count, into the state.

    Also returns the weight that each update got, in their order.
    """
    layout = model.carry.layout
    if PRESETS[configuration.preset].server == "average_factors":
        factors = [(u, n) for u, n in updates if isinstance(u, LowRank)]
        adapter = average_factors(factors, configuration.largest_rank())
        total = sum(examples for _, examples in updates)
        shares = [examples / total for _, examples in updates]
        return GlobalModel(Carry.empty(layout).add(adapter), adapter), shares
    families = FAMILY_OF | {"projected": PROJECTED_FAMILY[configuration.basis]}
    weights = {families[strand]: w for strand, w in configuration.mixing.weights.items()}
    mixed = aggregate(list(updates), layout, configuration.mixing.rule, weights)
    following = model
    for change in mixed.updates.values():
        if configuration.server_learning_rate != 1.0:
            change = change * configuration.server_learning_rate
        following = _with(following, change, configuration)
    return following, mixed.shares


def _with(model: GlobalModel, change: Update, configuration: RunConfiguration) -> GlobalModel:
    """The state with one family's change of a round."""
    if isinstance(change, LowRank):
        return replace(model, carry=model.carry.add(change))
    if isinstance(change, SeedScalars):
        return replace(model, sums=_with_scalars(model.sums, change, configuration))
    if isinstance(change, Sketch):
        return _with_sketch(model, change, configuration)
    if isinstance(change, ProjectedGradient):
        seen = change.shrunk() if configuration.projected.scale == "mmse" else change
        return replace(model, sums=(*model.sums, ProbeSum.of_projection(seen)))
    raise TypeError(f"no state for the family {change.family!r}")


def _with_sketch(
    model: GlobalModel, change: Sketch, configuration: RunConfiguration
) -> GlobalModel:
    """Read a round's sketch in the round's basis, and turn the basis towards what it shows."""
    basis = model.basis or first_basis(configuration, change.layout)
    assert basis is not None, "a sketch, and no node was asked for one"
    read = change.reconstruct(basis)
    whole = change.whole_change() if change.whole else None
    if whole is not None and model.whole is not None:
        whole = model.whole + whole
    return replace(
        model,
        carry=model.carry.add(read) if read.factors else model.carry,
        whole=whole or model.whole,
        basis=basis.refined(change),
    )


def _with_scalars(
    sums: tuple[ProbeSum, ...], change: SeedScalars, configuration: RunConfiguration
) -> tuple[ProbeSum, ...]:
    """The pool's sum with one round's scalars; a run has one pool, and it stands first."""
    layout, seed, size, probe = change.layout, change.master_seed, change.pool_size, change.probe
    if sums and sums[0].is_of(change):
        return (sums[0].add(change), *sums[1:])
    exponent = math.frexp(configuration.zeroth_order.learning_rate)[1] - STEP_BITS
    pool = ProbeSum.pool(layout, seed, size, probe, exponent, change.names)
    return (pool.add(change), *sums)


def first_components(adapter: LowRank, rank: int) -> LowRank:
    """The first ``rank`` rank components of every tensor: how HetLoRA shrinks a global adapter."""
    return LowRank(
        adapter.layout,
        {
            name: (factors.B[:, :rank], factors.A[:rank], factors.scale[:rank])
            for name, factors in adapter.factors.items()
        },
    )
