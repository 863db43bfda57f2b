"""Linear layers whose frozen weights have four or eight bits: quantise, dequantise, multiply.

The product with a few rows reads the packed weights once and never forms the matrix. The product
with many rows dequantises a panel of the matrix at a time into scratch memory and lets torch
multiply it. Accuracy: float32 inputs see float32 arithmetic, bfloat16 inputs bfloat16 products
summed in float32, as in a dense layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fedkernels import quantized_product as product
from fedkernels.autograd import reshaped, without_autocast
from fedkernels.checks import dense_tensor, finite_float32
from fedkernels.quantized_tensor import QuantizedTensor

QUANTIZE_FORMATS = ("nf4", "int4", "int8")
INPUT_TYPES = (torch.float32, torch.bfloat16)
LARGEST_HALF = 65504.0


def quantize(weight: torch.Tensor, fmt: str) -> QuantizedTensor:
    """Return a matrix in one of `QUANTIZE_FORMATS`; the formats of GGUF files can be imported only.

    Args:
        weight: floating point [out_features, in_features], on any device.
        fmt: "nf4" (4.13 bits a weight), "int4" (4.5) or "int8" (8, and a float32 a row).

    Raises:
        ValueError: the format is unknown, or `weight` is no finite matrix of floating point.
    """
    if fmt not in QUANTIZE_FORMATS:
        raise ValueError(f"fmt {fmt!r} is unknown; available: {', '.join(QUANTIZE_FORMATS)}")
    dense_tensor("weight", weight)
    if weight.is_meta:
        raise ValueError("weight must hold values, and on the device meta it holds none")
    if not weight.is_floating_point() or weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"weight must be a matrix of floating point, not {weight.dtype} of {tuple(weight.shape)}"
        )
    values = weight.detach().float().contiguous()
    low, high = values.aminmax()  # NaN if there is one anywhere
    if not (low.isfinite() and high.isfinite()):
        raise ValueError("weight has values that are not finite in float32")
    if fmt == "int4" and max(-low, high) > LARGEST_HALF:
        raise ValueError(f"weight has values beyond {LARGEST_HALF}, the largest minimum of int4")
    return product.quantize(values, fmt)


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the matrix [out_features, in_features] in `dtype`, rounded once from float32.

    The float32 values of an imported tensor have the bits that its own library gives them.

    Raises:
        ValueError: `dtype` is not floating point.
    """
    _check_quantized(tensor)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, and it is {dtype}")
    return product.dequantize(tensor, dtype)


def linear(
    x: torch.Tensor, tensor: QuantizedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x Wᵀ + bias; differentiable in `x` and `bias`.

    Args:
        x: float32 or bfloat16 [..., in_features], at least one row.
        tensor: W [out_features, in_features], on the same device.
        bias: float32 or the type of `x`, [out_features].

    Returns:
        [..., out_features], in the type of `x`; relative error to the product of the dequantised
        matrix in float64 below 1e-5 for float32 and 1e-2 for bfloat16.

    Raises:
        ValueError: an argument has the wrong type, shape or device, or `x` is empty.
    """
    _check_input(x, tensor, bias)
    if not torch.is_grad_enabled():
        return product.linear(_rows(x), tensor, bias).reshape(*x.shape[:-1], tensor.shape[0])
    y: torch.Tensor = _Linear.apply(x, tensor, bias)  # type: ignore[no-untyped-call]
    return y


def lora_linear(
    x: torch.Tensor,
    tensor: QuantizedTensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x (W + scale B A)ᵀ + bias; differentiable in `x`, `A`, `B` and `bias`.

    Base and adapter are added up in the output's own memory, and of the intermediate results only
    x Aᵀ, of r columns, is kept for the backward pass (LoRA: Hu et al., 2021, equation 3).

    Args:
        x: float32 or bfloat16 [..., in_features], at least one row.
        tensor: W [out_features, in_features], on the same device.
        A: float32 or the type of `x`, [r, in_features].
        B: the same, [out_features, r].
        scale: a finite number.
        bias: as in `linear`.

    Raises:
        ValueError: an argument has the wrong type, shape or device, or `x` is empty.
    """
    _check_input(x, tensor, bias)
    rank = A.shape[0] if dense_tensor("A", A).dim() == 2 else 0
    out_features, in_features = tensor.shape
    _check_parameter("A", A, x, (max(rank, 1), in_features))
    _check_parameter("B", B, x, (out_features, rank))
    if isinstance(scale, torch.Tensor) and scale.requires_grad:
        raise ValueError("scale is a number that gets no gradient, and it asks for one")
    scale = finite_float32("scale", scale)
    y: torch.Tensor = _LoraLinear.apply(x, A, B, scale, tensor, bias)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: torch.Tensor, tensor: QuantizedTensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.tensor = tensor
        ctx.bias_type = None if bias is None else bias.dtype
        y = product.linear(_rows(x), tensor, bias)
        return reshaped(y, (*x.shape[:-1], tensor.shape[0]))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx = None
        if ctx.needs_input_grad[0]:
            dx = product.linear_backward(_rows(dy), ctx.tensor)
            dx = dx.reshape(*dy.shape[:-1], ctx.tensor.shape[1])
        return dx, None, _bias_gradient(ctx, dy, 2)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        scale: float,
        tensor: QuantizedTensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        y, xa = product.lora_linear(_rows(x), tensor, A, B, scale, bias)
        ctx.save_for_backward(x, xa, A, B)
        ctx.scale, ctx.tensor = scale, tensor
        ctx.bias_type = None if bias is None else bias.dtype
        return reshaped(y, (*x.shape[:-1], tensor.shape[0]))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, xa, A, B = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        dx, da, db = product.lora_linear_backward(
            _rows(dy), _rows(x), xa, ctx.tensor, A, B, ctx.scale, needed
        )
        dx = None if dx is None else dx.reshape(x.shape)
        return dx, da, db, None, None, _bias_gradient(ctx, dy, 5)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return [rows, features], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _bias_gradient(ctx: Any, dy: torch.Tensor, position: int) -> torch.Tensor | None:
    if not ctx.needs_input_grad[position]:
        return None
    return dy.reshape(-1, dy.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_type)


def _check_input(x: torch.Tensor, tensor: QuantizedTensor, bias: torch.Tensor | None) -> None:
    _check_quantized(tensor)
    out_features, in_features = tensor.shape
    dense_tensor("x", x)
    if x.dtype not in INPUT_TYPES:
        raise ValueError(f"x must be float32 or bfloat16, and it is {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != in_features or x.numel() == 0:
        raise ValueError(
            f"x must be [..., {in_features}] with at least one row, and it is {tuple(x.shape)}"
        )
    if x.device != tensor.device:
        raise ValueError(f"x is on {x.device}, the weights on {tensor.device}")
    if bias is not None:
        _check_parameter("bias", bias, x, (out_features,))


def _check_quantized(tensor: QuantizedTensor) -> None:
    if not isinstance(tensor, QuantizedTensor):
        raise ValueError(f"tensor must be a QuantizedTensor, not {type(tensor).__name__}")


def _check_parameter(
    name: str, parameter: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]
) -> None:
    dense_tensor(name, parameter)
    if parameter.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"{name} must be float32 or {x.dtype}, and it is {parameter.dtype}")
    if parameter.shape != shape:
        raise ValueError(f"{name} must be {shape}, and it is {tuple(parameter.shape)}")
    if parameter.device != x.device:
        raise ValueError(f"{name} is on {parameter.device}, x on {x.device}")
