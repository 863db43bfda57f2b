"""The global model as the server holds it: the exact carry, and FedIT's adapter for that baseline.

A state is a value: a round turns one state and the accepted updates into the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from aggregators import Carry, Layout, LowRank, aggregate, average_factors, decode, encode
from aggregators.codec import pack, unpack
from aggregators.presets import Preset


@dataclass(frozen=True)
class GlobalModel:
    """``carry``: the exact running sum of all change. ``adapter``: FedIT's averaged factors, or None."""

    carry: Carry
    adapter: LowRank | None = None

    @classmethod
    def empty(cls, layout: Layout) -> GlobalModel:
        """The base model: no change yet."""
        return cls(Carry.empty(layout))

    def to_bytes(self) -> bytes:
        """Deterministic bytes of the whole state; ``from_bytes`` inverts them exactly."""
        parts = {"carry": self.carry.to_bytes()}
        if self.adapter is not None:
            parts["adapter"] = encode(self.adapter)
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
        return cls(Carry.from_bytes(parts["carry"], layout), adapter)

    def digest(self) -> str:
        """SHA-256 of ``to_bytes``."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def view(
        self, preset: Preset, rank: int, view_rank: int | None, energy: float | None
    ) -> LowRank:
        """What a node of ``rank`` gets to see of this state (module docstring of ``presets``)."""
        if preset.view == "whole":
            return self.carry.head(None, None)
        if preset.view == "capped":
            return self.carry.head(view_rank, energy)
        if self.adapter is not None:
            return first_components(self.adapter, rank)
        return self.carry.head(rank, None)

    def common_view(self, preset: Preset, view_rank: int | None, energy: float | None) -> LowRank:
        """The one view that is evaluated and exported: the same for every node.

        Averaged factors are no larger than the largest node's, so nothing is cut off them.
        """
        if self.adapter is not None:
            return self.adapter
        if preset.view == "whole":
            return self.carry.head(None, None)
        return self.carry.head(view_rank, energy)


def next_model(
    model: GlobalModel,
    updates: Sequence[tuple[LowRank, int]],
    preset: Preset,
    *,
    server_learning_rate: float,
    largest_rank: int,
) -> GlobalModel:
    """Fold one round's accepted updates, each with its example count, into the state."""
    layout = model.carry.layout
    if preset.server == "average_factors":
        adapter = average_factors(list(updates), largest_rank)
        return GlobalModel(Carry.empty(layout).add(adapter), adapter)
    change = aggregate(list(updates), layout).updates["low_rank"]
    assert isinstance(change, LowRank)
    if server_learning_rate != 1.0:
        change = change * server_learning_rate
    return GlobalModel(model.carry.add(change))


def first_components(adapter: LowRank, rank: int) -> LowRank:
    """The first ``rank`` rank components of every tensor: how HetLoRA shrinks a global adapter."""
    return LowRank(
        adapter.layout,
        {
            name: (factors.B[:, :rank], factors.A[:rank], factors.scale[:rank])
            for name, factors in adapter.factors.items()
        },
    )
