"""A walk along probes: the sum of its steps, and what it does to a weight.

Only float32 and wider weights hold a walk: folding a small step into bfloat16 loses most of it, into a
quantised weight all of it. Beside those the walk is kept as its terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

import fedkernels as fk

# The amount of each probe, by its seed: a change of sum_k amount_k z_k.
Terms = Mapping[int, float]


def holds_walk(weight: Tensor | fk.QuantizedTensor) -> bool:
    """Whether small steps can be added to the weight itself."""
    return isinstance(weight, Tensor) and weight.dtype in (torch.float32, torch.float64)


def add_terms(into: dict[int, float], terms: Terms) -> None:
    """Add ``terms`` to ``into``, probe by probe."""
    for seed, amount in terms.items():
        into[seed] = into.get(seed, 0.0) + amount


def move_(
    weight: Tensor, terms: Terms, tensor_id: int, probe: str, part: fk.Part | None = None
) -> Tensor:
    """Set weight to weight + sum_k amount_k z_k in one pass, rounded once, and return it.

    weight: contiguous, of any floating type that ``fedkernels`` moves, or float64.
    """
    moving = {seed: amount for seed, amount in terms.items() if amount != 0.0}
    if not moving:
        return weight
    if weight.dtype == torch.float64:
        for seed, amount in moving.items():
            z = fk.noise(seed, tensor_id, weight.shape, probe, part, weight.device)
            weight.add_(z.double(), alpha=amount)
        return weight
    if len(moving) == 1:
        ((seed, amount),) = moving.items()
        return fk.perturb_(weight, seed, amount, tensor_id, probe, part)
    coefficients, exponent = integers(list(moving.values()))
    return fk.replay_(weight, list(moving), coefficients, exponent, tensor_id, probe, part)


def perturbed(
    weight: Tensor,
    seed: int,
    scale: float,
    tensor_id: int,
    probe: str,
    out: Tensor | None = None,
    part: fk.Part | None = None,
) -> Tensor:
    """``fk.perturbed``, for float64 weights too."""
    if weight.dtype != torch.float64:
        return fk.perturbed(weight, seed, scale, tensor_id, probe, out, part)
    z = fk.noise(seed, tensor_id, weight.shape, probe, part, weight.device)
    return torch.add(weight, z.double(), alpha=scale, out=out)


def integers(amounts: list[float]) -> tuple[list[int], int]:
    """int32 coefficients and the exponent of the power of two that they multiply.

    The largest gets 30 bits, so each amount is rounded by at most 2**-30 of the largest.
    """
    exponent = max(-512, math.frexp(max(map(abs, amounts)))[1] - 30)
    return [round(math.ldexp(amount, -exponent)) for amount in amounts], exponent
