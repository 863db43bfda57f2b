"""Causal attention over grouped heads, rotary positions included, from the layers' own memory.

q, k and v are read where the linear layers wrote them, [batch, length, heads, width]: no transposed
copies, no repeated keys, no rotated copies. Kept for the gradient: q, k, v, the result, and one number
a query (the log of its row's sum); the probabilities are rebuilt block by block in the cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedkernels.backends import threads
from fedkernels.reference import training as reference
from fedkernels.training.checks import check_alike, check_floating, check_shape, compiled_for


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale q kᵀ) v, [batch, length, heads, width]; differentiable in q, k and v.

    Args:
        q: [batch, length, heads, width]; fp32 or bf16 for the compiled kernels.
        k: [batch, length, groups, width], groups a divisor of heads; v likewise.
        rotary: cosine and sine, each [batch or 1, length, width] in q's dtype: q and k are rotated by
            their positions first (`reference.training.rotate`).
        mask: bool [batch or 1, length, length], True where query i may look at key j; None: j <= i.
            A query that may look at nothing gets zeros.
        scale: default 1 / sqrt(width).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_floating("q", q, 4)
    batch, length, heads, width = q.shape
    check_floating("k", k, 4)
    check_alike("k", k, "q", q)
    check_alike("v", v, "q", q)
    groups = k.shape[2]
    check_shape("k", k, (batch, length, groups, width))
    check_shape("v", v, (batch, length, groups, width))
    if heads % groups:
        raise ValueError(f"k has {groups} heads, which do not divide the {heads} of q")
    if rotary is not None:
        _check_rotary(rotary, q)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, not {mask.dtype}")
        if mask.ndim != 3 or mask.shape[0] not in (1, batch):
            raise ValueError(f"mask must have one row or {batch}, not {tuple(mask.shape)}")
        check_shape("mask", mask, (mask.shape[0], length, length))
    scale = 1 / math.sqrt(width) if scale is None else scale
    isa = compiled_for(q, k, v, *(rotary or ()))
    if isa is None:
        return reference.attention(q, k, v, rotary, mask, scale)
    cosine, sine = rotary if rotary is not None else (None, None)
    result: Tensor = _Attention.apply(q, k, v, cosine, sine, mask, scale, isa)  # type: ignore[no-untyped-call]
    return result


def _check_rotary(rotary: tuple[Tensor, Tensor], q: Tensor) -> None:
    batch, length, _, width = q.shape
    if width % 2:
        raise ValueError(f"q has the odd width {width}, which cannot be rotated")
    for name, table in zip(("cosine", "sine"), rotary, strict=True):
        check_floating(name, table, 3)
        check_alike(name, table, "q", q)
        rows = table.shape[0]
        if rows not in (1, batch):
            raise ValueError(f"{name} must have one row or {batch}, not {rows}")
        check_shape(name, table, (rows, length, width))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cosine: Tensor | None,
        sine: Tensor | None,
        mask: Tensor | None,
        scale: float,
        isa: int,
    ) -> Tensor:
        from fedkernels import _cpu

        q, k, v = (t.detach().contiguous() for t in (q, k, v))
        if cosine is not None and sine is not None:
            cosine, sine = cosine.detach().contiguous(), sine.detach().contiguous()
        if mask is not None:
            mask = mask.contiguous().view(torch.uint8)
        out = torch.empty_like(q)
        log_sums = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        _cpu.attention(out, log_sums, q, k, v, cosine, sine, mask, scale, isa, threads())
        ctx.save_for_backward(q, k, v, cosine, sine, mask, out, log_sums)
        ctx.scale, ctx.isa = scale, isa
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from fedkernels import _cpu

        q, k, v, cosine, sine, mask, out, log_sums = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dout = dout.contiguous()
        problem = (q, k, v, cosine, sine, mask, ctx.scale, ctx.isa, threads())
        _cpu.attention_backward(dq, dk, dv, dout, out.detach(), log_sums, *problem)
        return dq, dk, dv, None, None, None, None, None
