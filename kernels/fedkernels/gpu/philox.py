"""The words of Philox inside a kernel.

It is Triton's own `tl.philox`: ten rounds of Philox4x32 with the constants of Random123, checked
against the reference by every test of a probe. A counter is a row of a tile, so that a thread
computes whole counters and no word twice; words reach the threads that hold their elements through
shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(seed, tensor_id, block):
    """Return the four words (uint32, [BLOCKS]) of the counters `block`.

    seed, tensor_id: int64 scalars, block: int64 [BLOCKS]; all with the bits of a uint64.
    """
    tensor = tl.zeros_like(block) + tensor_id.to(tl.int64)
    return tl.philox(
        seed,
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        tensor.to(tl.uint32),
        (tensor >> 32).to(tl.uint32),
    )


@triton.jit
def word_tile(seed, tensor_id, block, BLOCKS: tl.constexpr):
    """Return the words as a tile: uint32 [BLOCKS, 4]."""
    word0, word1, word2, word3 = words(seed, tensor_id, block)
    # join adds a last dimension: [block, word // 2, word % 2]
    return tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), [BLOCKS, 4])


@triton.jit
def one_word(seed, tensor_id, block, position):
    """Return word `position` (int32 [BLOCKS], 0 to 3) of each counter: uint32 [BLOCKS]."""
    word0, word1, word2, word3 = words(seed, tensor_id, block)
    lower = tl.where(position == 0, word0, word1)
    upper = tl.where(position == 2, word2, word3)
    return tl.where(position < 2, lower, upper)
