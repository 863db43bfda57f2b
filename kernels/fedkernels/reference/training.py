"""The truth about the training step's primitives: plain torch, differentiable by autograd.

Written as the models of Hugging Face transformers write them, rounding for rounding, so that what
equals these functions equals the plain model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + epsilon) * weight over the last axis."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * normal.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product (Shazeer, 2020): silu(gate) * up."""
    return functional.silu(gate) * up


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021) for x [batch, length, heads, width], in Llama's layout.

    cosine, sine: [batch or 1, length, width], the second half of the width repeating the first.
    """
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return x * cosine.unsqueeze(2) + turned * sine.unsqueeze(2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(scale q kᵀ) v over the allowed keys; zeros where a query may look at nothing.

    q [batch, length, heads, width]; k, v [batch, length, groups, width], each shared by
    heads / groups consecutive heads; mask: bool [batch or 1, length, length], True where query i
    may look at key j, or None for j <= i. Returns [batch, length, heads, width].
    """
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    sharing = q.shape[2] // k.shape[2]
    keys, values = (t.repeat_interleave(sharing, dim=2) for t in (k, v))
    length = q.shape[1]
    if mask is None:
        mask = torch.ones(1, length, length, dtype=torch.bool, device=q.device).tril()
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), keys.float()) * scale
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    blind = ~mask.any(dim=-1)[:, None, :, None]
    weights = scores.masked_fill(blind, 0).softmax(dim=-1).masked_fill(blind, 0)
    return torch.einsum("bhij,bjhd->bihd", weights, values.float()).to(q.dtype)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[tuple[Tensor, Tensor, float]],
) -> Tensor:
    """x weightᵀ + bias + sum of scale (x Aᵀ) Bᵀ over the factors (A, B, scale), as peft adds them."""
    return add_factors(functional.linear(x, weight, bias), x, factors)


def add_factors(
    result: Tensor, x: Tensor, factors: Sequence[tuple[Tensor, Tensor, float]]
) -> Tensor:
    """result + sum of scale (x Aᵀ) Bᵀ, rounded once to the dtype of x."""
    for a, b, scale in factors:
        result = result + functional.linear(functional.linear(x.to(a.dtype), a), b) * scale
    return result.to(x.dtype)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, int, int]:
    """Sum of the cross-entropies of hidden weightᵀ at the labelled rows, their number, the hits.

    hidden [rows, width]; weight [vocabulary, width]; labels int64 [rows], -100 where there is none.
    """
    chosen = labels != IGNORED
    logits = functional.linear(hidden[chosen], weight).float()
    wanted = labels[chosen]
    total = functional.cross_entropy(logits, wanted, reduction="sum")
    hits = int((logits.detach().argmax(dim=-1) == wanted).sum())
    return total, int(chosen.sum()), hits
