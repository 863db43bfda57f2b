"""What a plan asks of a device: memory by a simple model, and seconds on a device of its speed and link.

Simulated nodes share one machine, so neither can be measured there. The memory model counts what grows
with the method: weights, what backpropagation keeps, gradients and optimiser state, all in float32 but
the frozen weights. It leaves out what every method needs alike (Python, the tokenizer, one layer's
results).
"""

from __future__ import annotations

import math

from aggregators import Layout, match_targets
from aggregators.messages import Plan
from aggregators.methods import HybridMethod, LoraMethod, ZerothOrderMethod
from fedserver.configuration import NodeConfiguration

BYTES = {"float32": 4, "bfloat16": 2}
FLOAT = 4
ADAMW_STATE = 2  # moments beside each trained number
FORWARD_STREAMS = 2  # zeroth-order steps run both signs of a probe at once


def memory_bytes(plan: Plan, layout: Layout) -> int:
    """Bytes that a device needs for its part of a round, by the model above."""
    method = plan.method
    weights = layout.elements * BYTES[plan.dtype]
    tokens = plan.batch_size * plan.max_length
    matrices = match_targets(layout, ("all-linear",))
    kept = sum(layout.shape(name)[0] for name in matrices) * tokens * FLOAT
    if isinstance(method, HybridMethod):
        # Below the cut nothing is kept, and the copy that moves is float32.
        names = match_targets(layout, method.upper.target_modules, method.upper.layers)
        above = match_targets(layout, ("all-linear",), method.upper.layers)
        kept = sum(layout.shape(name)[0] for name in above) * tokens * FLOAT
        numbers = sum(method.upper.rank * sum(layout.shape(name)) for name in names)
        return layout.elements * FLOAT + kept + numbers * FLOAT * (2 + ADAMW_STATE)
    if isinstance(method, ZerothOrderMethod):
        widest = max((max(layout.shape(name)) for name in matrices), default=1)
        return weights + FORWARD_STREAMS * widest * tokens * FLOAT
    if isinstance(method, LoraMethod):
        names = match_targets(layout, method.target_modules)
        numbers = sum(method.rank * sum(layout.shape(name)) for name in names)
        return weights + kept + numbers * FLOAT * (2 + ADAMW_STATE)
    modules = method.target_modules
    names = match_targets(layout, modules) if modules else [spec.name for spec in layout]
    numbers = sum(math.prod(layout.shape(name)) for name in names)
    moments = ADAMW_STATE if method.optimiser == "adamw" else 0
    # A float32 copy that moves, its gradient, and the optimiser's state.
    return weights + kept + numbers * FLOAT * (2 + moments)


def device_seconds(node: NodeConfiguration | None, seconds: float, transferred: int) -> float:
    """Seconds of a round on the device that a node stands for: work at its speed, then its link.

    seconds: of work on this machine; transferred: bytes both ways.
    """
    if node is None:
        return seconds
    link = 8 * transferred / (node.link_mbps * 1e6) if node.link_mbps is not None else 0.0
    return seconds / node.speed + link
