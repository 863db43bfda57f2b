"""Which single weights to keep: the largest scores of a matrix or of each row, or two of every four.

A mask is a bool tensor of the scores' shape, True for what is kept. Of equal scores the leftmost
wins, so that a mask is a function of the scores alone: the same on every device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedkernels.backends import instruction_set
from fedkernels.checks import dense_tensor
from fedkernels.reference import pruning as reference

# Elements that the comparisons take at once: 2 MiB in float32, which caches hold.
ELEMENTS_AT_ONCE = 2**19


def unstructured_mask(scores: Tensor, ratio: float, per: str = "row") -> Tensor:
    """Return the mask that drops the lowest `ratio` of the scores.

    Args:
        scores: [out, in], floating and finite.
        ratio: what to drop, in [0, 1); of n scores, floor(ratio · n) are dropped.
        per: "row": so many of every row, which Wanda (Sun et al., 2023, section 3) found better;
            "matrix": so many of the whole matrix.

    Raises:
        ValueError: scores that are empty, not finite or no matrix; `ratio` or `per` out of range.
    """
    _check_scores(scores)
    check_ratio(ratio)
    if per not in ("row", "matrix"):
        raise ValueError(f"per must be 'row' or 'matrix', and it is {per!r}")
    rows = scores.detach() if per == "row" else scores.detach().reshape(1, -1)
    keep = rows.shape[1] - dropped(ratio, rows.shape[1])
    mask = reference.top_mask(rows, keep) if instruction_set() is None else _top_mask(rows, keep)
    return mask.reshape(scores.shape)


def two_of_four_mask(scores: Tensor) -> Tensor:
    """Return the 2:4 mask: of every four neighbours along the input dimension the two largest.

    GPUs multiply such weights at up to twice the speed. Where `in` is no multiple of four the last
    group of a row is shorter: of three the two largest are kept, of one or two all.

    Args:
        scores: [out, in], floating and finite.

    Raises:
        ValueError: scores that are empty, not finite or no matrix.
    """
    _check_scores(scores)
    if instruction_set() is None:
        return reference.two_of_four_mask(scores)
    out, columns = scores.shape
    if columns % 4:
        padded = scores.new_full((out, columns + -columns % 4), -torch.inf)
        padded[:, :columns] = scores
        return _two_of_four(padded)[:, :columns].contiguous()
    return _two_of_four(scores)


def check_ratio(ratio: float, name: str = "ratio") -> None:
    """Raise a ValueError unless `ratio` is in [0, 1)."""
    if not 0.0 <= ratio < 1.0:  # NaN is refused too
        raise ValueError(f"{name} must be in [0, 1), and it is {ratio}")


def dropped(ratio: float, count: int) -> int:
    """Return floor(ratio · count), where 0.3 · 10 is 3 and not what fp64 makes of it, 2.999...."""
    return min(int(ratio * count + 1e-9), count)


def _top_mask(scores: Tensor, keep: int) -> Tensor:
    """Select instead of sorting: all above the keep-th largest, and the leftmost of its equals."""
    columns = scores.shape[1]
    if keep == columns:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _order_statistic(scores, columns - keep)
    above = scores > threshold
    equal = scores == threshold
    missing = keep - above.sum(dim=1, keepdim=True)
    if int(equal.sum()) == int(missing.sum()):  # as good as always: no equals are left over
        return above.logical_or_(equal)
    return above.logical_or_(equal.logical_and_(equal.cumsum(dim=1) <= missing))


def _order_statistic(scores: Tensor, place: int) -> Tensor:
    """Return [rows, 1]: of each row the value that sorting would put at `place`."""
    if scores.device.type != "cpu":
        return scores.kthvalue(place + 1, dim=1, keepdim=True).values
    # numpy selects with vector instructions, torch element by element
    values = scores.float() if scores.itemsize < 4 else scores
    return torch.from_numpy(
        np.partition(values.numpy(), place, axis=1)[:, place : place + 1].copy()
    )


def _two_of_four(scores: Tensor) -> Tensor:
    """Six comparisons per group: a score is kept when it wins at least two of its three."""
    out, columns = scores.shape
    mask = torch.empty(out, columns // 4, 4, dtype=torch.bool, device=scores.device)
    step = max(1, ELEMENTS_AT_ONCE // columns)
    for start in range(0, out, step):
        rows = scores[start : start + step]
        a, b, c, d = rows.reshape(len(rows), -1, 4).permute(2, 0, 1).contiguous()
        ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
        kept = mask[start : start + step]
        kept[..., 0] = _two_of_three(ab, ac, ad)
        kept[..., 1] = _two_of_three(~ab, bc, bd)
        kept[..., 2] = _two_of_three(~ac, ~bc, cd)
        kept[..., 3] = _two_of_three(~ad, ~bd, ~cd)
    return mask.reshape(out, columns)


def _two_of_three(one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    return (one & two) | ((one | two) & three)


def _check_scores(scores: Tensor) -> None:
    dense_tensor("scores", scores)
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"scores must be a matrix with elements, and it is {list(scores.shape)}")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating, and it is {scores.dtype}")
    if not scores.isfinite().all():
        raise ValueError("scores must be finite, and it has a NaN or an infinity")
