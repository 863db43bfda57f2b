"""The sign adapter on a GPU: bits become signs in registers, and tensor cores multiply them.

A sign matrix S [inner, columns] is int32 words [ceil(inner / 32), 32 ceil(columns / 32)], bit
i % 32 of word [i // 32, j] set where S[i, j] = -1 (`reference/sign_adapter.py`). A product reads
1/16 of the bytes that bfloat16 factors would have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fedkernels.gpu.launching import launch
from fedkernels.gpu.philox import one_word
from fedkernels.gpu.placement import signed
from fedkernels.gpu.rank1 import COLUMN_STREAM, ROW_STREAM
from fedkernels.gpu.rounding import as_operand, load_operand, store_float
from fedkernels.gpu.sums import seed_tensor

BITS = 32  # of a word
GROUPS = 32  # words of each of 32 seeds that a program makes


@triton.jit(do_not_specialize=["tensor_id"])
def stream_kernel(
    words,
    seeds,
    seeds_count,
    padded: tl.int64,
    size: tl.int64,
    tensor_id: tl.int64,
    stream: tl.int64,
    GROUPS: tl.constexpr,
):
    """words[i // 32, k] = 32 signs of seed k's stream, zero bits beyond `size`; [.., padded].

    A program makes GROUPS words of 32 seeds, which lie beside each other.
    """
    k = tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32)[None, :]
    group = tl.program_id(1).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    seed = tl.load(seeds + k, mask=k < seeds_count, other=0)
    group, seed = tl.broadcast(group, seed)
    block = stream.to(tl.int64) + group // 4
    word = one_word(seed, tensor_id, block, (group % 4).to(tl.int32))
    left = tl.minimum(tl.maximum(size - group * 32, 0), 32)  # bits of this word that are signs
    known = ((tl.full([GROUPS, 32], 1, tl.int64) << left) - 1).to(tl.uint32)
    word = tl.where(k < seeds_count, word & known, 0)
    tl.store(words + group * padded + k, word.to(tl.int32, bitcast=True), mask=group * 32 < size)


@triton.jit
def transpose_kernel(out, words, groups, padded: tl.int64, out_padded: tl.int64, out_groups):
    """Transpose a bit matrix of `groups` rows of words: 32 x 32 bits a program.

    words: [groups, padded]; out: [out_groups, out_padded]; zero words fill the last rows up.
    """
    group = tl.program_id(0)  # of 32 rows, columns of the transposed matrix
    above = tl.program_id(1)  # of 32 columns
    lane = tl.arange(0, 32)
    column = above.to(tl.int64) * 32 + lane
    inside = (column < padded) & (group < groups)
    word = tl.load(words + group.to(tl.int64) * padded + column, mask=inside, other=0)
    bits = (word.to(tl.uint32, bitcast=True)[None, :] >> lane.to(tl.uint32)[:, None]) & 1
    turned = tl.sum(bits << lane.to(tl.uint32)[None, :], axis=1)  # disjoint bits: no carry
    where = out + above.to(tl.int64) * out_padded + group.to(tl.int64) * 32 + lane
    tl.store(where, turned.to(tl.int32, bitcast=True), mask=above < out_groups)


@triton.jit
def product_kernel(
    out,
    x,
    words,
    scale,
    add,
    rows,
    inner,
    columns,
    padded,
    COARSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out = x S * scale + add; x: [rows, inner], out, add: [rows, columns], scale: float32 [columns].

    Sums are float32. COARSE multiplies bfloat16, which signs are exactly.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    shift = tl.arange(0, 32).to(tl.uint32)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, inner, INNER):
        i = start + tl.arange(0, INNER)
        group = start // 32 + tl.arange(0, INNER // 32)
        known = (row < rows)[:, None] & (i < inner)[None, :]
        left = load_operand(x + row.to(tl.int64)[:, None] * inner + i[None, :], known, COARSE)
        stored = (group * 32 < inner)[:, None] & (column < columns)[None, :]
        word = tl.load(
            words + group.to(tl.int64)[:, None] * padded + column[None, :], mask=stored, other=0
        )
        bits = (word.to(tl.uint32, bitcast=True)[:, None, :] >> shift[None, :, None]) & 1
        sign = 1 - 2 * tl.reshape(bits, [INNER, COLUMNS]).to(tl.int32)
        # tf32x3: float32 as three terms of which tensor cores lose nothing that float32 keeps
        total = tl.dot(left, sign.to(left.dtype), total, input_precision="tf32x3")
    if scale is not None:
        total = total * tl.load(scale + column, mask=column < columns, other=0)[None, :]
    where = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if add is not None:
        total = total + load_operand(add + where, inside, False)
    store_float(out + where, total, inside)


def factors(
    seeds: Sequence[int], tensor_id: int, left_size: int, right_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the words of U [K, left_size] and of V transposed, [right_size, K]."""
    keys = seed_tensor(seeds, device)
    left = _stream(keys, tensor_id, ROW_STREAM, left_size)
    right = _stream(keys, tensor_id, COLUMN_STREAM, right_size)
    return transpose(left, len(seeds)), right


def transpose(words: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """Return the words of the transposed matrix, of which only `columns` columns are known."""
    groups, padded = words.shape
    out_groups = -(-(padded if columns is None else columns) // BITS)
    out = torch.empty(out_groups, groups * BITS, dtype=torch.int32, device=words.device)
    grid = (groups, out_groups)
    launch(
        transpose_kernel,
        grid,
        out.device,
        out,
        words,
        groups,
        padded,
        groups * BITS,
        out_groups,
        num_warps=1,
    )
    return out


def product(
    x: torch.Tensor,
    words: torch.Tensor,
    columns: int,
    scale: torch.Tensor | None,
    add: torch.Tensor | None,
    dtype: torch.dtype,
    coarse: bool,
) -> torch.Tensor:
    """Return x S * scale + add in `dtype`; `coarse` multiplies in bfloat16 and sums in float32.

    x: float32 or bfloat16 [rows, inner]; words of S: [inner, columns]; scale: float32 [columns];
    add: [rows, columns].
    """
    rows, inner = x.shape
    out = torch.empty(rows, columns, dtype=dtype, device=x.device)
    sizes = tile(rows)
    grid = (triton.cdiv(rows, sizes["ROWS"]), triton.cdiv(columns, sizes["COLUMNS"]))
    launch(
        product_kernel,
        grid,
        x.device,
        as_operand(out),
        as_operand(x),
        words,
        scale,
        None if add is None else as_operand(add),
        rows,
        inner,
        columns,
        words.shape[1],
        COARSE=coarse,
        **sizes,
    )
    return out


def tile(rows: int) -> dict[str, int]:
    """Return the sizes of a product's tile; for few rows the least that tensor cores take."""
    if rows <= 16:
        return {"ROWS": 16, "COLUMNS": 32, "INNER": 64}
    return {"ROWS": 64, "COLUMNS": 64, "INNER": 32}


def _stream(keys: torch.Tensor, tensor_id: int, stream: int, size: int) -> torch.Tensor:
    """Return the words of the streams' first `size` signs, transposed: [size, K]."""
    groups, padded = -(-size // BITS), -(-len(keys) // BITS) * BITS
    words = torch.empty(groups, padded, dtype=torch.int32, device=keys.device)
    grid = (padded // BITS, triton.cdiv(groups, GROUPS))
    arguments = (len(keys), padded, size, signed(tensor_id), stream)
    launch(stream_kernel, grid, words.device, words, keys, *arguments, GROUPS=GROUPS)
    return words
