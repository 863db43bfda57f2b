"""A matrix of few bits a weight: integer codes, and a scale for each block of them.

The weights are flattened row by row and cut into blocks of equal length (the last may be shorter),
as bitsandbytes does. A weight is

    value = table[code] * scale + minimum        both operations rounded to float32,

where `table` belongs to the format, and the sum is left out where the format has no minimums.

| format | code | table | block | scale | minimum |
|---|---|---|---|---|---|
| nf4 | 4 bits | quantiles of the normal distribution | 64 | float32, or 8 bits quantised again | |
| int4 | 4 bits | 0 .. 15 | 64 | float16 | float16 |
| int8 | int8 | -127 .. 127 | a row | float32 | |
| q4_0, q4_1, q8_0 | as in GGUF files | -8 .. 7, 0 .. 15, -128 .. 127 | 32 | float16 | float16 (q4_1) |

NF4 is from Dettmers et al., "QLoRA" (2023), section 3; the scales that are themselves quantised, in
blocks of 256 around their mean, are its "double quantization".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch

from fedkernels.checks import dense_tensor, sizes

# Quantiles of N(0, 1) with an exact zero, scaled to [-1, 1] (QLoRA, appendix E).
NF4: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Format:
    """What all tensors of one format have in common."""

    table: torch.Tensor | None  # float32 [16]: the value of each 4-bit code; None: int8 codes
    has_minimums: bool = False


FORMATS: Final[dict[str, Format]] = {
    "nf4": Format(torch.tensor(NF4)),
    "int4": Format(torch.arange(16.0), has_minimums=True),
    "int8": Format(None),
    "q4_0": Format(torch.arange(-8.0, 8.0)),
    "q4_1": Format(torch.arange(16.0), has_minimums=True),
    "q8_0": Format(None),
}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A frozen matrix [out_features, in_features] in one of `FORMATS`.

    Attributes:
        fmt: name of the format.
        shape: (out_features, in_features).
        block: weights that share a scale; even where codes have 4 bits.
        codes: int8 [out * in]; or uint8 [ceil(out * in / 2)], element 2i in the high four bits of
            byte i and element 2i + 1 in the low ones.
        scales: float32 or float16 [blocks]; or uint8 [blocks], codes of the float32
            `nested_code[scales] * nested_scales[block // nested_block] + nested_offset`.
        minimums: float16 [blocks], for the formats that have them.
        nested_scales: float32 [ceil(blocks / nested_block)].
        nested_code: float32 [256].
        nested_offset: float32 [1].
        nested_block: scales that share a nested scale.

    Raises:
        ValueError: a part has the wrong type, size or device, or a scale is not finite.
    """

    fmt: str
    shape: tuple[int, int]
    block: int
    codes: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None = None
    nested_scales: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None
    nested_block: int = 256

    def __post_init__(self) -> None:
        _check(self)

    @property
    def blocks(self) -> int:
        """How many blocks, hence scales, there are."""
        return -(-math.prod(self.shape) // self.block)

    @property
    def table(self) -> torch.Tensor | None:
        """The value of each 4-bit code, float32 [16]; None where codes are int8."""
        return FORMATS[self.fmt].table

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(part.nbytes for part in self.parts().values())

    @property
    def device(self) -> torch.device:
        """Where all parts are."""
        return self.codes.device

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the tensors that this one consists of, by attribute."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return the same matrix on another device."""
        moved = {name: part.to(device) for name, part in self.parts().items()}
        return QuantizedTensor(
            self.fmt, self.shape, self.block, nested_block=self.nested_block, **moved
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the matrix [out_features, in_features]; see `fedkernels.dequantize`."""
        from fedkernels.quantized import dequantize

        return dequantize(self, dtype)

    @classmethod
    def from_bitsandbytes(
        cls,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        code: torch.Tensor,
        blocksize: int,
        shape: tuple[int, int],
        **nested: Any,
    ) -> QuantizedTensor:
        """Take over a weight of bitsandbytes; see `quantized_import.from_bitsandbytes`."""
        from fedkernels import quantized_import

        return quantized_import.from_bitsandbytes(packed, absmax, code, blocksize, shape, **nested)

    @classmethod
    def from_gguf(cls, blocks: torch.Tensor, type: object) -> QuantizedTensor:
        """Take over a tensor of a GGUF file; see `quantized_import.from_gguf`."""
        from fedkernels import quantized_import

        return quantized_import.from_gguf(blocks, type)


PARTS: Final = ("codes", "scales", "minimums", "nested_scales", "nested_code", "nested_offset")


def _check(tensor: QuantizedTensor) -> None:
    if tensor.fmt not in FORMATS:
        raise ValueError(f"fmt {tensor.fmt!r} is unknown; available: {', '.join(FORMATS)}")
    for name in ("codes", "scales"):
        dense_tensor(name, getattr(tensor, name))
    if len(sizes("shape", tensor.shape)) != 2 or min(tensor.shape) < 1:
        raise ValueError(f"shape must be (out_features, in_features), not {tuple(tensor.shape)}")
    form = FORMATS[tensor.fmt]
    four_bits = form.table is not None
    if tensor.block < 1 or (four_bits and tensor.block % 2):
        raise ValueError(f"block must be positive, even for 4-bit codes, and it is {tensor.block}")
    if tensor.nested_block < 1:
        raise ValueError(f"nested_block must be positive, and it is {tensor.nested_block}")
    elements = math.prod(tensor.shape)
    nested = tensor.scales.dtype == torch.uint8
    code_type = torch.uint8 if four_bits else torch.int8
    scale_types = (torch.float32, torch.float16, torch.uint8)
    expected: dict[str, tuple[tuple[torch.dtype, ...], int | None]] = {
        "codes": ((code_type,), -(-elements // 2) if four_bits else elements),
        "scales": (scale_types, tensor.blocks),
        "minimums": ((torch.float16,), tensor.blocks if form.has_minimums else None),
        "nested_scales": (
            (torch.float32,),
            -(-tensor.blocks // tensor.nested_block) if nested else None,
        ),
        "nested_code": ((torch.float32,), 256 if nested else None),
        "nested_offset": ((torch.float32,), 1 if nested else None),
    }
    for name, (dtypes, size) in expected.items():
        _check_part(name, getattr(tensor, name), dtypes, size, tensor.codes.device)


def _check_part(
    name: str,
    part: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...],
    size: int | None,
    device: torch.device,
) -> None:
    """`size` None: the part must not be there."""
    if part is None or size is None:
        if part is not None or size is not None:
            raise ValueError(f"{name} {'is missing' if part is None else 'has no use here'}")
        return
    if part.dtype not in dtypes:
        raise ValueError(f"{name} must be one of {dtypes}, and it is {part.dtype}")
    if part.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), and it has {tuple(part.shape)}")
    if not part.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    if part.device != device:
        raise ValueError(f"{name} is on {part.device}, the codes on {device}")
    if part.is_floating_point() and part.device.type != "meta" and not part.isfinite().all():
        raise ValueError(f"{name} has values that are not finite")
