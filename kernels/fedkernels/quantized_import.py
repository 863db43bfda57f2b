"""Weights that others quantised: the layouts of bitsandbytes and GGUF, taken over without loss."""

from __future__ import annotations

import math

import torch

from fedkernels.checks import dense_tensor
from fedkernels.quantized_tensor import FORMATS, QuantizedTensor
from fedkernels.reference.quantized import pack

# Bytes of a block of 32 weights of a GGUF file, float16 scale (and minimum) first.
GGUF_BLOCK = 32
GGUF_BYTES = {"Q4_0": 2 + 16, "Q4_1": 2 + 2 + 16, "Q8_0": 2 + 32}


def from_bitsandbytes(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    shape: tuple[int, int],
    *,
    nested_absmax: torch.Tensor | None = None,
    nested_code: torch.Tensor | None = None,
    nested_blocksize: int = 256,
    nested_offset: torch.Tensor | float | None = None,
) -> QuantizedTensor:
    """Return an NF4 weight of bitsandbytes (`quantize_4bit`, `Params4bit`, or a checkpoint's keys).

    Nothing is converted: the codes and scales are used where they lie, so the tensors must not
    change afterwards.

    Args:
        packed: uint8, two weights a byte.
        absmax: `quant_state.absmax`: float32 [blocks], or uint8 where the scales are nested.
        code: `quant_state.code` (`quant_map` in a checkpoint): the sixteen values of NF4.
        blocksize: `quant_state.blocksize`.
        shape: `quant_state.shape`, (out_features, in_features).
        nested_absmax: `quant_state.state2.absmax`, float32.
        nested_code: `quant_state.state2.code` (`nested_quant_map`), float32 [256].
        nested_blocksize: `quant_state.state2.blocksize`.
        nested_offset: `quant_state.offset`.

    Raises:
        ValueError: `code` is another format's, or a part has the wrong type or size.
    """
    for name, part in (("packed", packed), ("absmax", absmax), ("code", code)):
        dense_tensor(name, part)
    table = FORMATS["nf4"].table
    assert table is not None
    if code.shape != table.shape or not torch.allclose(code.float().cpu(), table, atol=1e-6):
        raise ValueError("code is not that of NF4, the only 4-bit type of bitsandbytes known here")
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed must be uint8, and it is {packed.dtype}")
    if absmax.is_floating_point():
        absmax = absmax.float()
    if nested_offset is not None:
        nested_offset = torch.as_tensor(nested_offset, dtype=torch.float32, device=packed.device)
        nested_offset = nested_offset.reshape(-1)
    return QuantizedTensor(
        "nf4",
        (shape[0], shape[1]) if len(shape) == 2 else shape,
        blocksize,
        packed.flatten(),
        absmax.flatten(),
        nested_scales=None if nested_absmax is None else nested_absmax.float().flatten(),
        nested_code=None if nested_code is None else nested_code.float().flatten(),
        nested_offset=nested_offset,
        nested_block=nested_blocksize,
    )


def from_gguf(blocks: torch.Tensor, type: object) -> QuantizedTensor:
    """Return a tensor of a GGUF file: its codes and scales regrouped, none of them changed.

    Args:
        blocks: uint8 [out_features, bytes of a row], as in `gguf.GGUFReader(...).tensors[i].data`.
        type: "Q4_0", "Q4_1" or "Q8_0", or a `gguf.GGMLQuantizationType` of that name.

    Raises:
        ValueError: the type is not one of these, or `blocks` is no whole number of blocks a row.
    """
    name = str(getattr(type, "name", type))
    if name not in GGUF_BYTES:
        raise ValueError(f"type {name!r} cannot be taken over; available: {', '.join(GGUF_BYTES)}")
    size = GGUF_BYTES[name]
    dense_tensor("blocks", blocks)
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.numel() == 0:
        raise ValueError("blocks must be a uint8 matrix, a row of bytes for a row of weights")
    if blocks.shape[1] % size:
        raise ValueError(f"blocks has rows of {blocks.shape[1]} bytes, not a multiple of {size}")
    shape = (blocks.shape[0], blocks.shape[1] // size * GGUF_BLOCK)
    rows = blocks.reshape(-1, size)
    scales = _halves(rows[:, :2])
    if name == "Q8_0":
        codes = rows[:, 2:].contiguous().view(torch.int8).flatten()
        return QuantizedTensor("q8_0", shape, GGUF_BLOCK, codes, scales)
    minimums = _halves(rows[:, 2:4]) if name == "Q4_1" else None
    nibbles = rows[:, -16:]  # weight j in the low bits of byte j, weight j + 16 in the high ones
    codes = pack(torch.cat((nibbles & 15, nibbles >> 4), dim=1).flatten())
    assert codes.numel() == math.prod(shape) // 2
    return QuantizedTensor(name.lower(), shape, GGUF_BLOCK, codes, scales, minimums)


def _halves(pairs: torch.Tensor) -> torch.Tensor:
    """Return the float16 values of pairs of bytes [blocks, 2]."""
    return pairs.contiguous().view(torch.float16).flatten()
