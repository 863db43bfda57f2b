"""The truth about using probes: to move weights along them, and to measure a change along them.

Every function takes `elements`, the indices in the whole tensor of what the weight holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedkernels.reference.fma import fma
from fedkernels.reference.probes import UNITS, noise


def perturbed(
    weight: torch.Tensor,
    seed: int,
    step: float,
    tensor_id: int,
    probe: str,
    shape: tuple[int, ...],
    elements: torch.Tensor,
) -> torch.Tensor:
    """Return fma(q, step, weight) in float32, rounded once more to bfloat16 or float16 weights.

    `step` is a float32: the caller's scale times `UNITS[probe]`.
    """
    q = noise(seed, tensor_id, probe, shape, elements).reshape(weight.shape)
    return fma(q, torch.tensor(step, dtype=torch.float32), weight.float()).to(weight.dtype)


def replayed(
    weight: torch.Tensor,
    seeds: Sequence[int],
    coefficients: Sequence[int],
    factor: float,
    tensor_id: int,
    probe: str,
    shape: tuple[int, ...],
    elements: torch.Tensor,
) -> torch.Tensor:
    """Return weight + factor * sum_k coefficients[k] q_k: float64, then float32, then its dtype.

    The sum is an exact int64 for integer q. Gaussian q are summed in float64, in the order of the
    seeds; there each product and each sum is rounded.
    """
    exact = probe != "gaussian"
    total = torch.zeros(weight.shape, dtype=torch.int64 if exact else torch.float64)
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        q = noise(seed, tensor_id, probe, shape, elements).reshape(weight.shape)
        total += coefficient * (q.long() if exact else q.double())
    change = total.double() * factor
    return (weight.double() + change).float().to(weight.dtype)


def projected(
    delta: torch.Tensor,
    seeds: Sequence[int],
    tensor_id: int,
    probe: str,
    shape: tuple[int, ...],
    elements: torch.Tensor,
) -> torch.Tensor:
    """Return <delta, c q_k> for each seed: float64 [len(seeds)]."""
    flat = delta.double().flatten()
    inner = [flat @ noise(seed, tensor_id, probe, shape, elements).double() for seed in seeds]
    return UNITS[probe] * torch.stack(inner)
