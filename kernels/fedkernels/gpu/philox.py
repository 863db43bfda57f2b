"""Probe values inside a kernel: the words of Philox, and what the integer probes make of them.

A tile is [BLOCKS, WIDTH]: one counter a row, and the WIDTH consecutive elements that it defines
(`reference/probes.py`): 128 for `rademacher`, 4 for `popcount`. A thread computes whole counters,
so no word is computed twice; the words reach the threads that hold their elements through shared
memory.

Philox itself is Triton's `tl.philox`: ten rounds of Philox4x32 with the constants of Random123,
checked against its known answers by the tests.
"""

from __future__ import annotations

import triton
import triton.language as tl

RADEMACHER = tl.constexpr(0)
POPCOUNT = tl.constexpr(1)


@triton.jit
def words(seed, tensor_id, block):
    """Return the four words (uint32, [BLOCKS]) of the counters `block` (int64, bits of uint64)."""
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    tensor = tl.zeros_like(block) + tensor_id.to(tl.int64)
    return tl.philox(seed, low, high, tensor.to(tl.uint32), (tensor >> 32).to(tl.uint32))


@triton.jit
def word_tile(seed, tensor_id, block, BLOCKS: tl.constexpr):
    """Return the words as a tile: uint32 [BLOCKS, 4]."""
    word0, word1, word2, word3 = words(seed, tensor_id, block)
    pairs = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # [block, w % 2 .. w // 2] order
    return tl.reshape(pairs, [BLOCKS, 4])


@triton.jit
def sign_bits(seed, tensor_id, block, BLOCKS: tl.constexpr):
    """Return the bits of the Rademacher stream: uint32 [BLOCKS, 128], 1 where the probe is -1."""
    tile = word_tile(seed, tensor_id, block, BLOCKS)
    shifts = tl.arange(0, 32).to(tl.uint32)
    return tl.reshape((tile[:, :, None] >> shifts[None, None, :]) & 1, [BLOCKS, 128])


@triton.jit
def population_count(word):
    """Return how many bits of each word are set; compilers make one instruction of it."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return tl.mul(word, 0x01010101, sanitize_overflow=False) >> 24


@triton.jit
def integers_times(factor, seed, tensor_id, block, PROBE: tl.constexpr, BLOCKS: tl.constexpr):
    """Return factor * q, where q is the probe's integer: +1 or -1, or popcount's -16 .. 16.

    `factor` is a scalar or a tile [BLOCKS, WIDTH], of any arithmetic type; it gives the type of the
    result. With signs nothing is multiplied: the factor or its negative is selected.
    """
    if PROBE == RADEMACHER:
        bits = sign_bits(seed, tensor_id, block, BLOCKS)
        return tl.where(bits != 0, -factor, factor)
    else:
        tile = word_tile(seed, tensor_id, block, BLOCKS)
        return (population_count(tile).to(tl.int32) - 16).to(factor.dtype) * factor
