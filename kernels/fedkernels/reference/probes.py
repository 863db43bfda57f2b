"""The truth about probes: slow, plain torch that every other backend must equal bit for bit.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) is a counter-based generator: the word at a counter depends on nothing else, so a probe has
the same bits on every device, for every thread count, tile order and shard.

    key     = (seed low, seed high)
    counter = (block low, block high, tensor id low, tensor id high)

One counter gives four words of 32 bits. Element i of a tensor, in row-major order, is c * q:

    rademacher  q = +1 or -1 (a set bit): bit i % 32 of word (i // 32) % 4 of block i // 128; c = 1.
    popcount    q = bits set in word i % 4 of block i // 4, less 16: binomial; c = 1 / sqrt(8).
    gaussian    q = a normal float32 (`gaussian.py`): words 0 and 1 of block i // 4 give elements 0
                and 1 of the block, words 2 and 3 the others; c = 1.
    rank1       q[i, j] = u[i] v[j], of a tensor [m, ...] seen as [m, n]; c = 1. u and v are
                rademacher streams that begin at block 2**63 and block 2**63 + 2**62. A tensor with
                fewer than two dimensions has its rademacher probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, TypeVar

import torch

from fedkernels.reference.gaussian import gaussian_pair

Word = TypeVar("Word", int, torch.Tensor)

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

# c of each probe; the standard deviation of q is its inverse.
UNITS: Final[dict[str, float]] = {
    "rademacher": 1.0,
    "popcount": 1.0 / math.sqrt(8.0),
    "gaussian": 1.0,
    "rank1": 1.0,
}
# The largest |q| of the probes whose q is an integer.
LARGEST: Final[dict[str, int]] = {"rademacher": 1, "popcount": 16, "rank1": 1}

# First blocks of the streams of rank1, as the high words of a counter.
ROW_STREAM = 0x80000000
COLUMN_STREAM = 0xC0000000

# Elements that are made at once: bounds the memory of a large probe to some tens of megabytes.
ELEMENTS_AT_ONCE = 1 << 18


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[int, int]
) -> tuple[Word, Word, Word, Word]:
    """Return the four 32-bit words of Philox4x32-10 at `counter` under `key`.

    Words are Python integers, or int64 tensors of one shape whose values lie in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + WEYL_INCREMENTS[0]) & MASK
        k1 = (k1 + WEYL_INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def noise(
    seed: int, tensor_id: int, probe: str, shape: tuple[int, ...], elements: torch.Tensor
) -> torch.Tensor:
    """Return q at some elements of a tensor of `shape`, in the order of `elements`.

    Args:
        elements: row-major indices: int64 [count].

    Returns:
        float32 [count], exact: to be multiplied by `UNITS[probe]` for unit variance.
    """
    define = DEFINITIONS["rademacher" if probe == "rank1" and len(shape) < 2 else probe]
    chunks = elements.split(ELEMENTS_AT_ONCE)
    return torch.cat([define(seed, tensor_id, shape, chunk) for chunk in chunks])


def _rademacher(
    seed: int, tensor_id: int, shape: tuple[int, ...], elements: torch.Tensor, stream: int = 0
) -> torch.Tensor:
    words = _words(seed, tensor_id, elements // 128, stream)
    word = words.gather(1, (elements // 32 % 4)[:, None])[:, 0]
    return (1 - 2 * (word >> elements % 32 & 1)).float()


def _popcount(
    seed: int, tensor_id: int, shape: tuple[int, ...], elements: torch.Tensor
) -> torch.Tensor:
    words = _words(seed, tensor_id, elements // 4)
    word = words.gather(1, (elements % 4)[:, None])
    return ((word >> torch.arange(32) & 1).sum(dim=1) - 16).float()


def _gaussian(
    seed: int, tensor_id: int, shape: tuple[int, ...], elements: torch.Tensor
) -> torch.Tensor:
    words = _words(seed, tensor_id, elements // 4)
    pair = words.gather(1, (elements % 4 // 2 * 2)[:, None] + torch.arange(2))
    even, odd = gaussian_pair(pair[:, 0], pair[:, 1])
    return torch.where(elements % 2 == 0, even, odd)


def _rank1(
    seed: int, tensor_id: int, shape: tuple[int, ...], elements: torch.Tensor
) -> torch.Tensor:
    width = max(1, math.prod(shape[1:]))
    rows = _rademacher(seed, tensor_id, shape, elements // width, ROW_STREAM)
    return rows * _rademacher(seed, tensor_id, shape, elements % width, COLUMN_STREAM)


DEFINITIONS: Final[dict[str, Callable[[int, int, tuple[int, ...], torch.Tensor], torch.Tensor]]] = {
    "rademacher": _rademacher,
    "popcount": _popcount,
    "gaussian": _gaussian,
    "rank1": _rank1,
}


def _words(seed: int, tensor_id: int, blocks: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Return the words of some blocks: int64 [len(blocks), 4]. `stream` is added to block high."""
    block, position = torch.unique(blocks, return_inverse=True)  # many elements share a block
    counter = (
        block & MASK,
        (block >> 32) + stream,
        torch.full_like(block, tensor_id & MASK),
        torch.full_like(block, tensor_id >> 32),
    )
    words = torch.stack(philox4x32(counter, (seed & MASK, seed >> 32)), dim=1)
    return words[position]


def _multiply(multiplier: int, word: Word) -> tuple[Word, Word]:
    """Return the high and the low 32 bits of multiplier * word.

    The multiplier is split in halves because the whole product overflows a signed 64-bit integer.
    """
    upper = (multiplier >> 16) * word
    lower = (multiplier & 0xFFFF) * word
    high = (upper + (lower >> 16)) >> 16
    low = (((upper & 0xFFFF) << 16) + lower) & MASK
    return high, low
