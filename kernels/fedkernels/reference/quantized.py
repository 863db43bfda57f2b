"""The truth about quantised matrices: which code a weight gets, and which weight a code means.

Every step is rounded to float32 as it stands here, so that all backends agree bit for bit. The
layout and the formats are those of `fedkernels.quantized_tensor`.
"""

from __future__ import annotations

import math

import torch

from fedkernels.quantized_tensor import FORMATS, QuantizedTensor

BLOCK = 64  # weights that share a scale, in nf4 and int4
NESTED_BLOCK = 256  # scales of nf4 that share a scale
SMALLEST = 1e-38  # divides in place of a zero, in a block of zeros


def quantize(weight: torch.Tensor, fmt: str) -> QuantizedTensor:
    """Return `weight` (float32 [out, in], finite) in the format "nf4", "int4" or "int8"."""
    return {"nf4": _nf4, "int4": _int4, "int8": _int8}[fmt](weight)


def dequantize(tensor: QuantizedTensor) -> torch.Tensor:
    """Return the matrix in float32 [out, in]."""
    count = math.prod(tensor.shape)
    if tensor.table is None:
        values = tensor.codes.float()
    else:
        values = tensor.table.to(tensor.device)[unpack(tensor.codes)[:count].int()]
    values = values * spread(scales(tensor), tensor.block, count)
    if tensor.minimums is not None:
        values = values + spread(tensor.minimums.float(), tensor.block, count)
    return values.reshape(tensor.shape)


def linear(
    x: torch.Tensor, tensor: QuantizedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x Wᵀ + bias, in the type of `x`, computed in float64."""
    y = x.double() @ dequantize(tensor).double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def linear_backward(dy: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """Return dy W, the gradient of `linear` with respect to x, computed in float64."""
    return (dy.double() @ dequantize(tensor).double()).to(dy.dtype)


def lora_linear(
    x: torch.Tensor,
    tensor: QuantizedTensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x (W + scale B A)ᵀ + bias, in the type of `x`, computed in float64."""
    y = x.double() @ (dequantize(tensor).double() + scale * B.double() @ A.double()).T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def lora_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    tensor: QuantizedTensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `lora_linear` with respect to x, A and B, computed in float64."""
    dy64, x64, a64, b64 = dy.double(), x.double(), A.double(), B.double()
    dx = dy64 @ (dequantize(tensor).double() + scale * b64 @ a64)
    da = scale * (dy64 @ b64).T @ x64
    db = scale * dy64.T @ (x64 @ a64.T)
    return dx.to(x.dtype), da.to(A.dtype), db.to(B.dtype)


def scales(tensor: QuantizedTensor) -> torch.Tensor:
    """Return the scale of each block, float32 [blocks]."""
    if tensor.nested_scales is None or tensor.nested_code is None or tensor.nested_offset is None:
        return tensor.scales.float()
    values = tensor.nested_code[tensor.scales.int()]
    return (
        values * spread(tensor.nested_scales, tensor.nested_block, tensor.blocks)
        + tensor.nested_offset
    )


def spread(values: torch.Tensor, block: int, count: int) -> torch.Tensor:
    """Return [count]: the value of the block that each element is in."""
    return values.repeat_interleave(block)[:count]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return codes below 16 two to a byte, the first of two in the high bits: uint8."""
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.numel() % 2))
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes of `pack`, uint8, with one more where their number was odd."""
    return torch.stack((packed >> 4, packed & 15), dim=1).flatten()


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest entry of an ascending table; the lower one of two."""
    return torch.bucketize(values, borders(table), out_int32=True)


def borders(table: torch.Tensor) -> torch.Tensor:
    """Return the middles between neighbours of an ascending table, float32."""
    return (table[:-1] + table[1:]) / 2


def dynamic_code() -> torch.Tensor:
    """Return the 256 ascending values that an 8-bit scale may have, float32 in [-1, 1].

    The dynamic tree of Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (2016),
    section 2: decade 10**(i - 6) is divided into 2**i intervals, each represented by its middle;
    with both signs, zero and one.
    """
    magnitudes = []
    for i in range(7):
        borders = torch.linspace(0.1, 1, 2**i + 1)
        magnitudes.append(10.0 ** (i - 6) * ((borders[:-1] + borders[1:]) / 2))
    positive = torch.cat(magnitudes)
    return torch.cat((positive, -positive, torch.tensor([0.0, 1.0]))).sort().values


def _blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    """Return the flattened values as [blocks, block]; the last block is filled with its end."""
    flat = values.flatten()
    missing = -flat.numel() % block
    return torch.cat((flat, flat[-1:].expand(missing))).reshape(-1, block)


def _nf4(weight: torch.Tensor) -> QuantizedTensor:
    blocks = _blocks(weight, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    codes = nearest(blocks * inverse(absmax)[:, None], nf4_table())
    return nf4_of_parts(pack(codes.flatten()[: weight.numel()]), absmax, weight.shape)


def nf4_of_parts(codes: torch.Tensor, absmax: torch.Tensor, shape: torch.Size) -> QuantizedTensor:
    """Return an nf4 matrix with its scales quantised in turn.

    Args:
        codes: uint8, packed.
        absmax: float32 [blocks], the largest magnitude in each.
        shape: of the matrix.
    """
    # The mean in float64 is the same, once rounded, in whatever order the scales are added.
    offset = absmax.double().mean().float().reshape(1)
    nested = _blocks(absmax - offset, NESTED_BLOCK)
    nested_scales = nested.abs().amax(dim=1)
    nested_code = dynamic_code()
    scale_codes = nearest(nested * inverse(nested_scales)[:, None], nested_code)
    return QuantizedTensor(
        "nf4",
        (shape[0], shape[1]),
        BLOCK,
        codes,
        scale_codes.flatten()[: absmax.numel()].to(torch.uint8),
        nested_scales=nested_scales,
        nested_code=nested_code,
        nested_offset=offset,
        nested_block=NESTED_BLOCK,
    )


def inverse(scales: torch.Tensor) -> torch.Tensor:
    """Return what a block is multiplied by to be divided by its scale; finite for a zero."""
    return 1 / scales.float().clamp(min=SMALLEST)


def nf4_table() -> torch.Tensor:
    """Return the sixteen ascending values of nf4."""
    table = FORMATS["nf4"].table
    assert table is not None
    return table


def int4_steps(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and minimums, float16 [blocks], for blocks with these ranges."""
    minimums = low.half()
    # The scale spans the range from the rounded minimum on, so that rounding that costs little.
    return ((high - minimums.float()).clamp(min=0) / 15).half(), minimums


def _int4(weight: torch.Tensor) -> QuantizedTensor:
    blocks = _blocks(weight, BLOCK)
    steps, minimums = int4_steps(*blocks.aminmax(dim=1))
    codes = (blocks - minimums.float()[:, None]) * inverse(steps)[:, None]
    codes = codes.round().clamp(0, 15)
    return QuantizedTensor(
        "int4",
        (weight.shape[0], weight.shape[1]),
        BLOCK,
        pack(codes.flatten()[: weight.numel()]),
        steps,
        minimums,
    )


def _int8(weight: torch.Tensor) -> QuantizedTensor:
    steps = weight.abs().amax(dim=1) / 127
    codes = (weight * inverse(steps)[:, None]).round().clamp(-127, 127).to(torch.int8)
    return QuantizedTensor(
        "int8", (weight.shape[0], weight.shape[1]), weight.shape[1], codes.flatten(), steps
    )
