"""The A of LoRA that a seed stands for, and the layout of the B beside it: public, never sent."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

import fedkernels as fk
from aggregators.layout import Layout


def shared_a(shared_seed: int, tensor_id: int, rank: int, in_features: int) -> Tensor:
    """The A [rank, in] that a seed stands for: the same bits on every device.

    Rademacher entries with the variance of peft's Kaiming-uniform start, 1 / (3 in). A smaller rank
    gives the first rows of a larger one.
    """
    return fk.noise(shared_seed, tensor_id, (rank, in_features)) / math.sqrt(3 * in_features)


def factor_layout(layout: Layout, names: Sequence[str], rank: int) -> Layout:
    """The B [out, r] of the matrices ``names`` as a layout of their own, under the matrices' names.

    r is ``rank``, or less where a matrix is smaller. ValueError for tensors that are no matrices.
    """
    shapes = {}
    for name in sorted(names, key=layout.tensor_id):
        if len(layout.shape(name)) != 2:
            raise ValueError(f"layer {name!r} is no matrix, so it has no factors")
        rows, columns = layout.shape(name)
        shapes[name] = (rows, min(rank, rows, columns))
    return Layout(shapes)
