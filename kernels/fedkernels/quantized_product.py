"""How the products with a quantised matrix are computed, on rows [rows, features] that were checked.

The reference computes in float64. The other backends dequantise panels of the matrix, not all of
it, into memory that is used again and again: fresh memory would cost more than the dequantising,
for the system clears it page by page.
"""

from __future__ import annotations

import torch

from fedkernels.backends import instruction_set
from fedkernels.quantized_tensor import QuantizedTensor
from fedkernels.reference import quantized as reference


def quantize(weight: torch.Tensor, fmt: str) -> QuantizedTensor:
    """Return a contiguous float32 matrix in a format that `reference.quantize` knows."""
    return reference.quantize(weight, fmt)


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix in `dtype`."""
    return reference.dequantize(tensor).to(dtype)


def linear(x: torch.Tensor, tensor: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x Wᵀ + bias, [rows, out_features]."""
    return reference.linear(x, tensor, bias)


def linear_backward(dy: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """Return dy W, [rows, in_features]."""
    return reference.linear_backward(dy, tensor)


def lora_linear(
    x: torch.Tensor,
    tensor: QuantizedTensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (W + scale B A)ᵀ + bias, and x Aᵀ."""
    xa = x @ A.to(x.dtype).T
    if instruction_set() is None:
        return reference.lora_linear(x, tensor, A, B, scale, bias), xa
    y = linear(x, tensor, bias)
    return y.addmm_(xa, B.to(x.dtype).T, alpha=scale), xa


def lora_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    xa: torch.Tensor,
    tensor: QuantizedTensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    needed: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients to x, A and B, each where it is needed, else None."""
    if instruction_set() is None:
        return reference.lora_linear_backward(dy, x, tensor, A, B, scale)
    to_x, to_a, to_b = needed
    dx: torch.Tensor | None = None
    da: torch.Tensor | None = None
    db: torch.Tensor | None = None
    dyb = dy @ B.to(dy.dtype) if to_x or to_a else None
    if to_x and dyb is not None:
        dx = linear_backward(dy, tensor).addmm_(dyb, A.to(dy.dtype), alpha=scale)
    if to_a and dyb is not None:
        da = (dyb.T @ x).to(A.dtype).mul_(scale)
    if to_b:
        db = (dy.T @ xa).to(B.dtype).mul_(scale)
    return dx, da, db
