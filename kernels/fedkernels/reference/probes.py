"""The truth about probes: slow, plain torch that every other backend must equal bit for bit.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) is a counter-based generator: the word at a counter depends on nothing else, so a probe has
the same bits on every device, for every thread count, tile order and shard.

    key     = (seed low, seed high)
    counter = (block low, block high, tensor id low, tensor id high)

One counter gives four words of 32 bits, hence 128 Rademacher elements: element i of a tensor, in
row-major order, is bit i % 32 of word (i // 32) % 4 of block i // 128, and a set bit means -1.
"""

from __future__ import annotations

from typing import TypeVar

import torch

Word = TypeVar("Word", int, torch.Tensor)

ROUNDS = 10
ELEMENTS_PER_BLOCK = 128
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

# Blocks that are expanded at once: bounds the memory of a large probe to some tens of megabytes.
BLOCKS_AT_ONCE = 1 << 14


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


def rademacher(seed: int, tensor_id: int, count: int) -> torch.Tensor:
    """Return elements 0 .. count - 1 of the Rademacher probe: float32 [count], each +1 or -1."""
    values = torch.empty(count, dtype=torch.float32)
    blocks = -(-count // ELEMENTS_PER_BLOCK)
    shifts = torch.arange(32, dtype=torch.int64)
    for start in range(0, blocks, BLOCKS_AT_ONCE):
        block = torch.arange(start, min(start + BLOCKS_AT_ONCE, blocks), dtype=torch.int64)
        counter = (
            block & MASK,
            block >> 32,
            torch.full_like(block, tensor_id & MASK),
            torch.full_like(block, tensor_id >> 32),
        )
        words = torch.stack(philox4x32(counter, (seed & MASK, seed >> 32)), dim=1)
        bits = (words[:, :, None] >> shifts) & 1  # [blocks, 4, 32]
        first = start * ELEMENTS_PER_BLOCK
        chunk = values[first : first + bits.numel()]
        chunk.copy_(1 - 2 * bits.reshape(-1)[: chunk.numel()])
    return values


def _multiply(multiplier: int, word: Word) -> tuple[Word, Word]:
    """Return the high and the low 32 bits of multiplier * word.

    The multiplier is split in halves because the whole product overflows a signed 64-bit integer.
    """
    upper = (multiplier >> 16) * word
    lower = (multiplier & 0xFFFF) * word
    high = (upper + (lower >> 16)) >> 16
    low = (((upper & 0xFFFF) << 16) + lower) & MASK
    return high, low
