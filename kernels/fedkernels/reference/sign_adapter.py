"""The truth about the sign adapter: the factors of rank-1 probes as bits, and products with them.

The rank-1 probe of a tensor [m, ...], seen as a matrix [m, n], is z[i, j] = u[i] v[j]. Both factors
are Rademacher streams of the same seed and tensor id, read from blocks that no dense probe reaches:

    u: element i is bit i % 32 of word (i // 32) % 4 of block 2**63 + i // 128, set for -1
    v: the same from block 2**63 + 2**62 on

A sign matrix S [inner, columns] is kept as int32 words [ceil(inner / 32), 32 ceil(columns / 32)]:
bit i % 32 of word [i // 32, j] is set where S[i, j] = -1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedkernels.reference.probes import MASK, philox4x32

LEFT_BLOCK = 2**63
RIGHT_BLOCK = 2**63 + 2**62
BITS = 32  # of a word
ELEMENTS_PER_BLOCK = 128  # four words


def factor_bits(seed: int, tensor_id: int, first_block: int, count: int) -> torch.Tensor:
    """Return the bits of elements 0 .. count - 1 of a factor of a rank-1 probe: int64 [count].

    `count` is below 2**39, so that the lower half of the block number does not overflow.
    """
    block = torch.arange(-(-count // ELEMENTS_PER_BLOCK), dtype=torch.int64)
    counter = (
        block,
        torch.full_like(block, first_block >> 32),
        torch.full_like(block, tensor_id & MASK),
        torch.full_like(block, tensor_id >> 32),
    )
    words = torch.stack(philox4x32(counter, (seed & MASK, seed >> 32)), dim=1)
    return _bits(words.reshape(-1, 1)).reshape(-1)[:count]


def factors(
    seeds: Sequence[int], tensor_id: int, left_size: int, right_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the words of U [K, left_size] and of V transposed, [right_size, K]."""
    left = [factor_bits(seed, tensor_id, LEFT_BLOCK, left_size) for seed in seeds]
    right = [factor_bits(seed, tensor_id, RIGHT_BLOCK, right_size) for seed in seeds]
    return pack(torch.stack(left)), pack(torch.stack(right).T)


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Return the words of a matrix of bits [inner, columns]; zeros fill them up."""
    inner, columns = bits.shape
    padded = torch.zeros(-(-inner // BITS) * BITS, -(-columns // BITS) * BITS, dtype=torch.int64)
    padded[:inner, :columns] = bits
    weights = 2 ** torch.arange(BITS, dtype=torch.int64)
    words = (padded.reshape(-1, BITS, padded.shape[1]) * weights[:, None]).sum(1)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def signs(words: torch.Tensor, inner: int, columns: int) -> torch.Tensor:
    """Return the matrix [inner, columns] that `words` hold: float32, each +1 or -1."""
    bits = _bits(words).transpose(1, 2).reshape(-1, words.shape[1])
    return (1 - 2 * bits[:inner, :columns]).to(torch.float32)


def transpose(words: torch.Tensor) -> torch.Tensor:
    """Return the words of the transposed matrix."""
    return pack(_bits(words).transpose(1, 2).reshape(-1, words.shape[1]).T)


def product(
    x: torch.Tensor,
    words: torch.Tensor,
    columns: int,
    scale: torch.Tensor | None,
    add: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return x S * scale + add in `dtype`, computed in float32.

    x: [rows, inner]; words of S: [inner, columns]; scale: [columns]; add: [rows, columns].
    """
    out = x.float() @ signs(words, x.shape[1], columns).to(x.device)
    if scale is not None:
        out = out * scale
    if add is not None:
        out = out + add.float()
    return out.to(dtype)


def _bits(words: torch.Tensor) -> torch.Tensor:
    """Return the bits of words [a, b] as int64 [a, b, 32]."""
    return (words.to(torch.int64)[:, :, None] >> torch.arange(BITS, device=words.device)) & 1
