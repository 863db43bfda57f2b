"""Which elements of a whole tensor a weight holds: all, a stretch of them, or some rows and columns.

Probes are functions of the index in the *whole* tensor. A node that holds a shard or a pruned layer
names what it has by a `Part`, and gets the part of everybody's probe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedkernels.checks import sizes, whole_number

Indices = Sequence[int] | torch.Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """Elements of a tensor of `shape`, in row-major order.

    Either a stretch of consecutive elements from element `offset` on (a shard), or, where `rows` or
    `columns` are given, the elements in those rows and columns (a pruned layer). A tensor
    [m, ...] has m rows, and its other dimensions together are its columns; None means all of them.

    Args:
        shape: sizes of the whole tensor.
        offset: index of the first element held.
        rows, columns: strictly increasing indices; stored as int64 tensors on the CPU.

    Raises:
        ValueError: an index is out of range or out of order, or `offset` comes with rows or columns.
    """

    shape: tuple[int, ...]
    offset: int = 0
    rows: Indices | None = None
    columns: Indices | None = None

    def __post_init__(self) -> None:
        shape = sizes("shape", self.shape)
        if math.prod(shape) >= 2**62:
            raise ValueError(f"shape {shape} has more elements than a probe")
        object.__setattr__(self, "shape", shape)
        offset = whole_number("offset", self.offset, 0, math.prod(shape) + 1)
        object.__setattr__(self, "offset", offset)
        if self.selects and self.offset:
            raise ValueError("offset names a stretch, so it does not go with rows or columns")
        if self.selects and not shape:
            raise ValueError("rows and columns need a shape with at least one dimension")
        for name, indices, end in (
            ("rows", self.rows, self.height),
            ("columns", self.columns, self.width),
        ):
            if indices is not None:
                object.__setattr__(self, name, _checked(name, indices, end))

    @property
    def selects(self) -> bool:
        """Whether this part is rows and columns, rather than a stretch of elements."""
        return self.rows is not None or self.columns is not None

    @property
    def height(self) -> int:
        """Rows of the whole tensor."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Columns of the whole tensor."""
        return math.prod(self.shape[1:])

    def check_holds(self, name: str, shape: Sequence[int]) -> None:
        """Raise ValueError naming `name` unless a tensor of `shape` can hold this part."""
        count = math.prod(shape)
        if not self.selects:
            whole = math.prod(self.shape)
            if self.offset + count > whole:
                raise ValueError(
                    f"{name} has {count} elements from offset {self.offset} on, and the whole has "
                    f"only {whole}"
                )
            return
        held = (_length(self.rows, self.height), _length(self.columns, self.width))
        if count != math.prod(held) or not shape or shape[0] != held[0]:
            raise ValueError(
                f"{name} has shape {list(shape)}, and the part has {held[0]} rows and "
                f"{held[1]} columns"
            )

    def elements(self, count: int) -> torch.Tensor:
        """Return the indices in the whole of the `count` elements held: int64 [count]."""
        if not self.selects:
            return torch.arange(self.offset, self.offset + count)
        rows = torch.arange(self.height) if self.rows is None else torch.as_tensor(self.rows)
        columns = (
            torch.arange(self.width) if self.columns is None else torch.as_tensor(self.columns)
        )
        return (rows[:, None] * self.width + columns).flatten()

    def pieces(self, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what compiled kernels walk along: (pieces int64 [P, 3], gather int64 [G] or None).

        A piece is (first element here, first element in the whole, length in the whole), consecutive
        in both. With `gather`, a piece is a row, and of it only the elements at these places are here.
        """
        if not self.selects:
            return torch.tensor([[0, self.offset, count]]), None
        rows = torch.arange(self.height) if self.rows is None else torch.as_tensor(self.rows)
        if self.columns is None:  # neighbouring rows are one piece
            first = torch.ones(len(rows), dtype=torch.bool)
            first[1:] = rows[1:] != rows[:-1] + 1
            starts = first.nonzero()[:, 0]
            lengths = torch.diff(starts, append=torch.tensor([len(rows)]))
            return torch.stack([starts, rows[starts], lengths], dim=1) * self.width, None
        columns = torch.as_tensor(self.columns)
        start, end = int(columns[0]), int(columns[-1]) + 1
        pieces = torch.empty(len(rows), 3, dtype=torch.int64)
        pieces[:, 0] = torch.arange(len(rows)) * len(columns)
        pieces[:, 1] = rows * self.width + start
        pieces[:, 2] = end - start
        return pieces, columns - start


def _length(indices: Indices | None, otherwise: int) -> int:
    return otherwise if indices is None else len(indices)


def _checked(name: str, indices: Indices, end: int) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a list of indices, not {indices!r:.40}") from None
    if tensor.numel() == 0:
        tensor = tensor.long()
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be a list of indices")
    tensor = tensor.detach().to("cpu", torch.int64).clone()
    if tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) < end):
        raise ValueError(f"{name} must be in [0, {end})")
    if not bool((tensor[1:] > tensor[:-1]).all()):
        raise ValueError(f"{name} must be strictly increasing")
    return tensor
