"""What the probes make of Philox's words: factor * q, for a tile of elements.

A tile is [BLOCKS, WIDTH]. Either its rows are counters, and the WIDTH elements of a counter follow
each other: 128 for `rademacher`, 4 for `popcount` and `gaussian`. Or WIDTH is 1, and every element
has a counter of its own and a position in it: for elements that do not follow each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedkernels.gpu.gaussian import gaussian_pair
from fedkernels.gpu.philox import one_word, word_tile, words

RADEMACHER = tl.constexpr(0)
POPCOUNT = tl.constexpr(1)
GAUSSIAN = tl.constexpr(2)
PROBES = {"rademacher": 0, "popcount": 1, "gaussian": 2}
ELEMENTS = {"rademacher": 128, "popcount": 4, "gaussian": 4}  # of one counter


@triton.jit
def scaled_probe(
    factor,
    seed,
    tensor_id,
    block,
    position,
    PROBE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return factor * q: [BLOCKS, WIDTH], of the factor's type.

    factor: scalar or tile of an arithmetic type; block: int64 [BLOCKS]; position: int32 [BLOCKS],
    in the counter, where WIDTH is 1. With signs nothing is multiplied: the factor or its negative
    is selected.
    """
    if PROBE == RADEMACHER:
        bits = _sign_bits(seed, tensor_id, block, position, BLOCKS, WIDTH)
        value = tl.where(bits != 0, -factor, factor)
    elif PROBE == POPCOUNT:
        if WIDTH == 1:
            word = one_word(seed, tensor_id, block, position)[:, None]
        else:
            word = word_tile(seed, tensor_id, block, BLOCKS)
        value = (_population_count(word).to(tl.int32) - 16).to(factor.dtype) * factor
    else:
        value = _normal(seed, tensor_id, block, position, BLOCKS, WIDTH).to(factor.dtype) * factor
    return value


@triton.jit
def _sign_bits(seed, tensor_id, block, position, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the bits of the Rademacher stream: uint32 [BLOCKS, WIDTH], 1 where the sign is -1."""
    if WIDTH == 1:
        word = one_word(seed, tensor_id, block, position // 32)
        bits = ((word >> (position % 32).to(tl.uint32)) & 1)[:, None]
    else:
        tile = word_tile(seed, tensor_id, block, BLOCKS)
        shifts = tl.arange(0, 32).to(tl.uint32)
        bits = tl.reshape((tile[:, :, None] >> shifts[None, None, :]) & 1, [BLOCKS, WIDTH])
    return bits


@triton.jit
def _population_count(word):
    """Return how many bits of each word are set; compilers make one instruction of it."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return tl.mul(word, 0x01010101, sanitize_overflow=False) >> 24


@triton.jit
def _normal(seed, tensor_id, block, position, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Return normal values: float32 [BLOCKS, WIDTH]."""
    word0, word1, word2, word3 = words(seed, tensor_id, block)
    if WIDTH == 1:
        lower = position < 2
        even, odd = gaussian_pair(tl.where(lower, word0, word2), tl.where(lower, word1, word3))
        value = tl.where(position % 2 == 0, even, odd)[:, None]
    else:
        even, odd = gaussian_pair(tl.join(word0, word2), tl.join(word1, word3))
        value = tl.reshape(tl.join(even, odd), [BLOCKS, WIDTH])
    return value
