"""Which counters a launch computes: the elements that a weight holds of its whole tensor.

A stretch of consecutive elements is a run of counters, whose first may begin `skip` elements before
the stretch. Rows and columns of a pruned layer are computed element by element, each with a counter
of its own (`distributions.py`): more words, but no index of an element is ever stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fedkernels.gpu.distributions import ELEMENTS, PROBES
from fedkernels.part import Part

# Elements of a program's tile, as many as its registers hold without spilling (seen in the compiled
# kernels): a counter's row of 128 signs needs no other state, the others keep Philox's beside them.
TILE = {"rademacher": 8192, "popcount": 2048, "gaussian": 2048}
SCATTERED_TILE = 1024


@dataclass(frozen=True)
class Placement:
    """The arguments that every elementwise kernel has last, and its grid."""

    arguments: tuple[int, int, int, torch.Tensor | None, torch.Tensor | None, int, int]
    constants: dict[str, int]
    tiles: int


def placement(part: Part, count: int, probe: str, device: torch.device) -> Placement:
    """Return how a kernel reaches the `count` elements that a weight holds of `part`."""
    elements = ELEMENTS[probe]
    constants = {"PROBE": PROBES[probe], "ELEMENTS": elements}
    if part.selects:
        rows, columns = held_rows(part).to(device), held_columns(part).to(device)
        size = {"BLOCKS": SCATTERED_TILE, "WIDTH": 1}
        place = (0, 0, count, rows, columns, len(columns), part.width)
        return Placement(place, constants | size, triton.cdiv(count, SCATTERED_TILE))
    first, skip = divmod(part.offset, elements)
    # Small tensors get small tiles: for a norm's 64 weights a large tile is mostly mask.
    blocks = max(16, min(TILE[probe], triton.next_power_of_2(skip + count)) // elements)
    size = {"BLOCKS": blocks, "WIDTH": elements}
    tiles = triton.cdiv(skip + count, blocks * elements)
    return Placement((first, skip, count, None, None, 0, 0), constants | size, tiles)


def held_rows(part: Part) -> torch.Tensor:
    """Return the indices of the rows that a part selects: int64, on the CPU."""
    return torch.arange(part.height) if part.rows is None else torch.as_tensor(part.rows)


def held_columns(part: Part) -> torch.Tensor:
    """Return the indices of the columns that a part selects: int64, on the CPU."""
    return torch.arange(part.width) if part.columns is None else torch.as_tensor(part.columns)


def signed(value: int) -> int:
    """Return the signed 64-bit integer with the bits of `value`, which is what kernels take."""
    return value - 2**64 if value >= 2**63 else value


@triton.jit
def tile(
    first_block,
    skip,
    count,
    rows,
    columns,
    held,
    width,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Return this program's counters and positions [BLOCKS], local indices and mask [BLOCKS, WIDTH].

    The local index is that of the element in the weight's own memory.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    if WIDTH == 1:
        known = row < count
        above = tl.load(rows + row // held, mask=known, other=0)
        element = above * width + tl.load(columns + row % held, mask=known, other=0)
        block = element // ELEMENTS
        position = (element % ELEMENTS).to(tl.int32)
        local = row[:, None]
    else:
        block = first_block + row
        position = tl.zeros([BLOCKS], dtype=tl.int32)  # unused: a row has all of a counter
        local = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :] - skip
    return block, position, local, (local >= 0) & (local < count)
