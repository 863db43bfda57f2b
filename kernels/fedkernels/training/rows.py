"""RMSNorm and SwiGLU: functions of a row or an element, limited by memory, one pass each.

Plain torch writes RMSNorm as six passes with two changes of dtype, and keeps five tensors of the
size of x for its gradient; here x and one number a row are kept. SwiGLU keeps gate and up alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedkernels.backends import threads
from fedkernels.reference import training as reference
from fedkernels.training.checks import check_alike, check_floating, check_shape, compiled_for


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * weight, the mean in fp32 over the last axis.

    x [..., n], weight [n]; any floating dtype, compiled for fp32 and bf16 where weight has the dtype
    of x and needs no gradient. Differentiable in x. ValueError for shapes that do not fit.
    """
    check_floating("x", x)
    check_shape("weight", weight, (x.shape[-1],))
    isa = compiled_for(x, weight)
    if isa is None or weight.requires_grad:
        return reference.rms_norm(x, weight, epsilon)
    result: Tensor = _RmsNorm.apply(x, weight, epsilon, isa)  # type: ignore[no-untyped-call]
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; both of one shape and dtype, else ValueError. Differentiable in both."""
    check_floating("gate", gate)
    check_shape("up", up, tuple(gate.shape))
    check_alike("up", up, "gate", gate)
    isa = compiled_for(gate, up)
    if isa is None:
        return reference.swiglu(gate, up)
    result: Tensor = _SwiGlu.apply(gate, up, isa)  # type: ignore[no-untyped-call]
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, isa: int) -> Tensor:
        from fedkernels import _cpu

        x, weight = x.detach().contiguous(), weight.detach().contiguous()
        rows = x.view(-1, x.shape[-1])
        y, rstd = torch.empty_like(x), torch.empty(len(rows), dtype=torch.float32)
        _cpu.rms_norm(y.view_as(rows), rstd, rows, weight, epsilon, isa, threads())
        ctx.save_for_backward(x, weight, rstd)
        ctx.isa = isa
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from fedkernels import _cpu

        x, weight, rstd = ctx.saved_tensors
        rows = x.view(-1, x.shape[-1])
        dx = torch.empty_like(rows)
        _cpu.rms_norm_backward(
            dx, dy.contiguous().view_as(rows), rows, weight, rstd, ctx.isa, threads()
        )
        return dx.view_as(x), None, None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, isa: int) -> Tensor:
        from fedkernels import _cpu

        gate, up = gate.detach().contiguous(), up.detach().contiguous()
        y = torch.empty_like(gate)
        _cpu.swiglu(y, gate, up, isa, threads())
        ctx.save_for_backward(gate, up)
        ctx.isa = isa
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from fedkernels import _cpu

        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _cpu.swiglu_backward(dgate, dup, dy.contiguous(), gate, up, ctx.isa, threads())
        return dgate, dup, None
