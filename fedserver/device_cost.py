"""What a plan asks of a device: memory and bytes by a simple model, and seconds at its speed and link.

Simulated nodes share one machine, so seconds cannot be measured there, and a strand is chosen before
anything runs. The memory model counts what grows with the model, the data and the method, all in float32
but the frozen weights. It leaves out what every method needs alike (Python, the tokenizer). How far it
is from what a process takes is measured in tests/fedserver/test_memory_model.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aggregators import Layout, match_targets
from aggregators.basis import side_widths
from aggregators.messages import Plan
from aggregators.methods import (
    CohortMethod,
    DeviceMethod,
    HybridMethod,
    LoraMethod,
    ProjectedMethod,
    SketchMethod,
    ZerothOrderMethod,
)
from fedserver.configuration import NodeConfiguration

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, None: 4}
# Of a weight in a linear layer: codes, and the scale of each 64 of them (kernels' quantized_tensor).
BITS = {"nf4": 4.5, "int4": 4.5, "int8": 8.0}
FLOAT = 4
ADAMW_STATE = 2  # moments beside each trained number
FORWARD_STREAMS = 2  # zeroth-order steps run both signs of a probe at once
LIVE = 6  # results of a layer's widest matrix that a forward pass holds at once
KEPT = 2  # of each result of a layer that backpropagation keeps, and of those between
EVALUATION_BATCH = 16
HEAD_ROWS = 256  # of logits that the loss makes at once
ENVELOPE = 2048  # bytes of a reply beside its numbers, and of what says where they belong:
NAMED = 320  # names, shapes and scales of one tensor
SCALAR_BYTES = 3  # of the place of a scalar in the pool, at most


@dataclass(frozen=True)
class Memory:
    """Bytes: of the frozen base, of what a node makes of the run's view, and of its work."""

    base: int
    view: int
    work: int

    @property
    def total(self) -> int:
        """All of it at once."""
        return self.base + self.view + self.work


def memory_of(plan: Plan, layout: Layout, view_rank: int = 0, pool_size: int = 0) -> Memory:
    """Bytes that a device needs for its part of a round, by the model above.

    view_rank: of the carry that nodes see; pool_size: of the run's zeroth-order probes, 0 for none.
    """
    method = plan.method
    if isinstance(method, CohortMethod):
        return Memory(0, 0, 0)  # An edge has no model.
    matrices = match_targets(layout, ("all-linear",))
    sides = sum(sum(layout.shape(name)) for name in matrices)
    whole = layout.elements * BYTES[plan.dtype]
    quantised = plan.base_format != "full"
    base = _quantised_bytes(plan, layout) if quantised else whole
    carry = view_rank * sides * FLOAT
    signs = pool_size * sum(sum(s.shape) for s in layout if len(s.shape) == 2) // 8
    if quantised:
        view = carry + signs
    else:
        # Change along probes, or a method that moves weights, asks for a copy of them at the view,
        # which a node alone in its process trains itself.
        moved = pool_size > 0 or not isinstance(method, LoraMethod)
        view = whole if moved else carry
    return Memory(
        base, view, max(_training(plan, layout), _passing(plan, layout, _evaluated(plan)))
    )


def upload_bytes(plan: Plan, layout: Layout) -> int:
    """Bytes of a reply, at most."""
    wire = BYTES[plan.wire_dtype]
    if isinstance(plan.method, HybridMethod):
        parts = (plan.method.lower, plan.method.upper)
        return sum(_sent(part, plan, layout, wire) for part in parts)
    assert not isinstance(plan.method, CohortMethod), "what a sum takes depends on who answers"
    return _sent(plan.method, plan, layout, wire)


def _sent(method: DeviceMethod, plan: Plan, layout: Layout, wire: int) -> int:
    if isinstance(method, ZerothOrderMethod):
        used = min(method.pool_size, plan.local_steps * method.directions)
        return ENVELOPE + used * (wire + SCALAR_BYTES)
    if isinstance(method, ProjectedMethod):
        return ENVELOPE + sum(NAMED + count * wire for count in method.coordinates.values())
    names = _trained(method, layout)
    around = ENVELOPE + NAMED * len(names)
    if isinstance(method, LoraMethod):
        ranks = 2 * method.rank if method.sends == "delta" else method.rank
        sizes = [layout.shape(name) for name in names]
        return around + sum(ranks * (m + (n if method.train_a else 0)) for m, n in sizes) * wire
    assert isinstance(method, SketchMethod)
    first = plan.round == 1  # whose basis is wider
    return around + sum(_sketched(layout.shape(name), method, first) for name in names) * wire


def device_seconds(node: NodeConfiguration | None, seconds: float, transferred: int) -> float:
    """Seconds of a round on the device that a node stands for: work at its speed, then its link.

    seconds: of work on this machine; transferred: bytes both ways.
    """
    if node is None:
        return seconds
    link = 8 * transferred / (node.link_mbps * 1e6) if node.link_mbps is not None else 0.0
    return seconds / node.speed + link


def _training(plan: Plan, layout: Layout) -> int:
    method = plan.method
    assert not isinstance(method, CohortMethod), "an edge does not train"
    tokens = plan.batch_size * plan.max_length
    if isinstance(method, ZerothOrderMethod):
        return _passing(plan, layout, FORWARD_STREAMS * tokens)
    if isinstance(method, HybridMethod):
        # Below the cut nothing is kept, and the copy that moves is float32.
        names = match_targets(layout, method.upper.target_modules, method.upper.layers)
        above = match_targets(layout, ("all-linear",), method.upper.layers)
        kept = KEPT * sum(layout.shape(name)[0] for name in above) * tokens * FLOAT
        numbers = sum(method.upper.rank * sum(layout.shape(name)) for name in names)
        return kept + _head(plan, layout, tokens) + numbers * FLOAT * (2 + ADAMW_STATE)
    matrices = match_targets(layout, ("all-linear",))
    kept = KEPT * sum(layout.shape(name)[0] for name in matrices) * tokens * FLOAT
    head = _head(plan, layout, tokens)
    names = _trained(method, layout)
    if isinstance(method, LoraMethod):
        numbers = sum(method.rank * sum(layout.shape(name)) for name in names)
        return kept + head + numbers * FLOAT * (2 + ADAMW_STATE)
    numbers = sum(math.prod(layout.shape(name)) for name in names)
    # What it was before, its gradient, and the optimiser's state.
    state = 0
    if method.optimiser == "adamw":
        if isinstance(method, SketchMethod) and method.within:
            moved = sum(_sketched(layout.shape(name), method, first=True) for name in names)
        else:
            moved = numbers
        state = ADAMW_STATE * moved
    return kept + head + (2 * numbers + state) * FLOAT


def _passing(plan: Plan, layout: Layout, tokens: int) -> int:
    """A forward pass that keeps nothing."""
    widest = max((max(layout.shape(n)) for n in match_targets(layout, ("all-linear",))), default=1)
    return LIVE * widest * tokens * FLOAT + _head(plan, layout, tokens)


def _head(plan: Plan, layout: Layout, tokens: int) -> int:
    """Logits of a chunk, and a quantised head as it is while the loss is computed."""
    linear = set(match_targets(layout, ("all-linear",)))
    heads = [s.shape for s in layout if len(s.shape) == 2 and s.name not in linear]
    largest = max(heads, key=math.prod, default=(0, 0))
    dense = math.prod(largest) * BYTES[plan.dtype] if plan.base_format != "full" else 0
    return min(HEAD_ROWS, tokens) * largest[0] * FLOAT + dense


def _evaluated(plan: Plan) -> int:
    return EVALUATION_BATCH * plan.max_length if plan.evaluate else 0


def _quantised_bytes(plan: Plan, layout: Layout) -> int:
    linear = set(match_targets(layout, ("all-linear",)))
    total = 0.0
    for spec in layout:
        size = math.prod(spec.shape)
        if spec.name in linear:
            total += size * BITS[plan.base_format] / 8
        else:
            total += size if len(spec.shape) == 2 else size * BYTES[plan.dtype]
    return int(total)


def _trained(method: DeviceMethod, layout: Layout) -> list[str]:
    assert not isinstance(method, HybridMethod), "it trains in two ways"
    modules = method.target_modules
    return match_targets(layout, modules) if modules else [spec.name for spec in layout]


def _sketched(shape: tuple[int, ...], method: SketchMethod, first: bool) -> int:
    found = side_widths(shape, method.rank, method.oversampling, wide=first)
    if found is None:
        return math.prod(shape)
    return shape[0] * found[0] + shape[1] * found[1]
