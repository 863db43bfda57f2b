"""Whole numbers as bytes, each in as many bits as the largest of them takes.

What a node is told of a pool of seeds is one total a seed. Rounded to 32 bits each they are four bytes a
seed, and most runs' totals take 20 bits or less.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WIDEST = 32
# A multiple of 8, so that pieces end at whole bytes; it bounds the memory that bits take one by one.
PIECE = 1 << 16


def width_of(values: Tensor) -> int:
    """Bits that hold every value in two's complement, 1 to 32. Raises ValueError for larger values."""
    if values.numel() == 0:
        return 1
    smallest, largest = int(values.min()), int(values.max())
    # Of -x, two's complement needs the bits of x - 1: ~x.
    width = 1 + max((n if n >= 0 else ~n).bit_length() for n in (smallest, largest))
    if width > WIDEST:
        raise ValueError(f"a value takes {width} bits, more than {WIDEST}")
    return width


def pack_bits(values: Tensor, width: int) -> Tensor:
    """int64 [n] -> uint8 [ceil(n width / 8)]: each value + 2**(width - 1), the highest bit first.

    The last byte ends with zeros.
    """
    pieces = []
    for piece in torch.split(values, PIECE):
        raised = (piece.numpy() + (1 << (width - 1))).astype(">u4")
        bits = np.unpackbits(raised.view(np.uint8).reshape(-1, 4), axis=1)[:, WIDEST - width :]
        pieces.append(np.packbits(bits))
    return torch.from_numpy(np.concatenate(pieces)) if pieces else torch.zeros(0, dtype=torch.uint8)


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """The int64 [count] that ``pack_bits`` wrote. Raises ValueError for bytes of another length."""
    if type(width) is not int or not 1 <= width <= WIDEST:
        raise ValueError(f"{width!r} bits are not from 1 to {WIDEST}")
    if packed.dtype != torch.uint8 or packed.ndim != 1 or len(packed) != -(-count * width // 8):
        raise ValueError(f"{count} values of {width} bits take {-(-count * width // 8)} bytes")
    if count and int(packed[-1]) & ((1 << (-count * width % 8)) - 1):
        raise ValueError(f"there is more than {count} values of {width} bits")
    values = torch.empty(count, dtype=torch.int64)
    for start in range(0, count, PIECE):
        own = values[start : start + PIECE]
        piece = packed[start * width // 8 :].numpy()
        bits = np.unpackbits(piece, count=len(own) * width).reshape(-1, width)
        whole = np.zeros((len(own), WIDEST), dtype=np.uint8)
        whole[:, WIDEST - width :] = bits
        raised = np.packbits(whole, axis=1).view(">u4")[:, 0].astype(np.int64)
        own.copy_(torch.from_numpy(raised)).sub_(1 << (width - 1))
    return values
