"""Which way of training a device can afford, from its public limits and the models of ``device_cost``.

The first that fits is taken, best first: LoRA on the whole base, then on eight bits, then on four; the
same with half the rank, and so on; all weights, projected; forward passes alone, on the whole base and
on fewer bits. A choice is a function of the scenario and the layout, so a resumed run makes it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aggregators import Layout
from aggregators.messages import Capabilities
from aggregators.methods import BaseFormat
from fedserver.configuration import ConfigurationError, NodeConfiguration, RunConfiguration
from fedserver.device_cost import memory_of, upload_bytes
from fedserver.planner import make_plan

FORMATS: tuple[BaseFormat, ...] = ("full", "int8", "nf4")
AUTO = "auto"
MEGABYTE, KILOBYTE = 10**6, 10**3


@dataclass(frozen=True)
class Choice:
    """A way to train, in the words of a node's entry, and the bytes that it takes."""

    entry: Mapping[str, Any]
    words: str
    memory: int
    upload: int

    def fits(self, node: NodeConfiguration, deadline: float) -> bool:
        """Whether a device's limits allow it."""
        return (
            self.memory <= _memory_limit(node)
            and self.upload <= _upload_limit(node, deadline)
            and (node.backpropagates or self.entry["strand"] == "zeroth-order")
        )


def with_choices(
    configuration: RunConfiguration, layout: Layout
) -> tuple[RunConfiguration, dict[str, str]]:
    """The scenario with a strand for every node that left it open, and why, by node.

    Raises ConfigurationError, with the smallest need, for a device that cannot do what it is asked, or
    can do nothing.
    """
    nodes, reasons = [], {}
    # What the others may be is unknown while one chooses: the pool counts for all as soon as it may.
    pool = any(_may_be(configuration, node, "zeroth-order") for node in configuration.nodes)
    for node in configuration.nodes:
        if not node.trains or (node.strand != AUTO and not _limited(node)):
            nodes.append(_settled(node))
            continue
        rest = configuration.nodes[len(nodes) + 1 :]
        so_far = configuration.model_copy(update={"nodes": (*nodes, node, *rest)})
        ways = list(_ways(so_far, node, layout, pool))
        if not ways:
            raise ConfigurationError(
                f"node {node.name!r}: nothing that the scenario asks for can be done on the base as"
                f" {node.base_format or 'full'!r}; use base_format = 'full', or leave it out"
            )
        chosen = next((w for w in ways if w.fits(node, configuration.deadline_seconds)), None)
        if chosen is None:
            raise ConfigurationError(_impossible(node, ways, configuration.deadline_seconds))
        if node.strand == AUTO:
            reasons[node.name] = _reason(node, chosen, ways, configuration.deadline_seconds)
            node = node.model_copy(update=dict(chosen.entry))
        nodes.append(node)
    settled = configuration.model_copy(update={"nodes": tuple(nodes)})
    try:
        settled.check_weights()
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    return settled, reasons


def _ways(
    configuration: RunConfiguration, node: NodeConfiguration, layout: Layout, pool: bool
) -> Iterator[Choice]:
    """What a node could be asked for, best first; only what its entry says where it says something."""
    formats = [node.base_format] if node.base_format else list(FORMATS)
    if node.strand != AUTO:
        formats = [configuration.base_format_of(node.name)]
    elif not configuration.sums_stand_beside:
        formats = [name for name in formats if name == "full"]
    entries: list[tuple[dict[str, Any], str]] = []
    if _may_be(configuration, node, "lora"):
        rank = node.lora_r or configuration.lora_r
        ranks = [rank >> halved for halved in range(rank.bit_length())]
        entries += [
            ({"strand": "lora", "base_format": name, "lora_r": r}, f"lora of rank {r}")
            for r in (ranks if node.strand == AUTO else [rank])
            for name in formats
        ]
    if _may_be(configuration, node, "projected") and "full" in formats:
        entries.append(({"strand": "projected", "base_format": "full"}, "projected"))
    if _may_be(configuration, node, "zeroth-order"):
        entries += [
            ({"strand": "zeroth-order", "base_format": name}, "zeroth-order") for name in formats
        ]
    for entry, words in entries:
        if not _allowed(configuration, node, entry):
            continue
        asked = _with(configuration, node.model_copy(update=entry))
        plan = make_plan(
            asked, _device(node.name, layout), round_number=1, layout=layout, base_digest="0" * 64
        )
        seeds = configuration.zeroth_order.pool_size if pool else 0
        memory = memory_of(plan, layout, configuration.view_rank or 0, seeds)
        where = "" if entry["base_format"] == "full" else f" on {entry['base_format']}"
        yield Choice(entry, words + where, memory.total, upload_bytes(plan, layout))


def _allowed(
    configuration: RunConfiguration, node: NodeConfiguration, entry: Mapping[str, Any]
) -> bool:
    """Whether the scenario would be valid with this entry, so that its ledger can be read again."""
    chosen = node.model_copy(update=dict(entry))
    nodes = tuple(chosen if n.name == node.name else n for n in configuration.nodes)
    try:
        configuration.model_copy(update={"nodes": nodes}).check_formats()
    except ValueError:
        return False
    return True


def _may_be(configuration: RunConfiguration, node: NodeConfiguration, strand: str) -> bool:
    return strand == configuration.strand(node.name) if node.strand != AUTO else node.trains


def _with(configuration: RunConfiguration, node: NodeConfiguration) -> RunConfiguration:
    """The scenario as if this were the only node: what the others do changes no cost of its own."""
    return configuration.model_copy(update={"nodes": (node,)})


def _settled(node: NodeConfiguration) -> NodeConfiguration:
    """A node that does not train needs no strand."""
    return node.model_copy(update={"strand": None}) if node.strand == AUTO else node


def _reason(node: NodeConfiguration, chosen: Choice, ways: list[Choice], deadline: float) -> str:
    needs = f"{_mb(chosen.memory)} and {_kb(chosen.upload)} up"
    better = ways[: ways.index(chosen)]
    if not better:
        return f"{chosen.words}: {needs}, within all limits"
    first = better[0]
    if not node.backpropagates and first.entry["strand"] != "zeroth-order":
        return f"{chosen.words}: {needs}; the device does not backpropagate"
    if first.memory > _memory_limit(node):
        over = f"{_mb(first.memory)} of {_mb(int(_memory_limit(node)))}"
    else:
        over = f"{_kb(first.upload)} up of {_kb(int(_upload_limit(node, deadline)))}"
    return f"{chosen.words}: {needs}; {first.words} would take {over}"


def _impossible(node: NodeConfiguration, ways: list[Choice], deadline: float) -> str:
    able = [w for w in ways if node.backpropagates or w.entry["strand"] == "zeroth-order"]
    if not able:
        return (
            f"node {node.name!r}: {ways[0].words} needs backpropagation; take backpropagates = false"
            " out, or set strand = 'zeroth-order'"
        )
    sent = [way for way in able if way.upload <= _upload_limit(node, deadline)]
    if not sent:
        least = min(able, key=lambda way: way.upload)
        return (
            f"node {node.name!r} cannot send {_kb(least.upload)} a round, the least that it could be"
            f" asked for ({least.words}); raise upload_limit_kb or link_mbps, or leave the node out"
        )
    least = min(sent, key=lambda way: way.memory)
    return (
        f"node {node.name!r}: memory_limit_mb {node.memory_limit_mb:g} is too little; the least that it"
        f" could be asked for needs {_mb(least.memory)} ({least.words})"
    )


def _limited(node: NodeConfiguration) -> bool:
    given = (node.memory_limit_mb, node.upload_limit_kb)
    return any(limit is not None for limit in given) or not node.backpropagates


def _memory_limit(node: NodeConfiguration) -> float:
    return float("inf") if node.memory_limit_mb is None else node.memory_limit_mb * MEGABYTE


def _upload_limit(node: NodeConfiguration, deadline: float) -> float:
    """What a round may send: as the entry says, and no more than its link sends until the deadline."""
    asked = float("inf") if node.upload_limit_kb is None else node.upload_limit_kb * KILOBYTE
    link = float("inf") if node.link_mbps is None else node.link_mbps * 1e6 / 8 * deadline
    return min(asked, link)


def _device(name: str, layout: Layout) -> Capabilities:
    """A device without limits: those of the scenario are what counts here."""
    return Capabilities(
        node=name, examples=1, held_out=0, rank_limit=1 << 16, base_digest="0" * 64,
        layout_json=layout.to_json(), threads=1, memory_bytes=0, device="cpu", versions={},
    )  # fmt: skip


def _mb(count: int) -> str:
    return f"{-(-count // MEGABYTE):,} MB"


def _kb(count: int) -> str:
    return f"{-(-count // KILOBYTE):,} kB"
