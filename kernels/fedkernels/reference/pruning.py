"""Importance scores and masks, slow and plain: whole matrices, one line a formula, full sorts.

W is a linear's weight [out, in]; scores are float32 [out, in], larger for what matters more.
"""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|W|."""
    return weight.float().abs()


def wanda(weight: Tensor, input_norms: Tensor) -> Tensor:
    """|W_ij| ||x_j||_2 (Sun et al., 2023, eq. 1); `input_norms` [in]."""
    return weight.float().abs() * input_norms.float()


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """|W_ij dL/dW_ij|: the loss's change, to first order, when the weight becomes 0."""
    return (weight.float() * gradient.float()).abs()


def lora_gradient(
    weight: Tensor, b: Tensor, a: Tensor, b_gradient: Tensor, a_gradient: Tensor, scale: float
) -> Tensor:
    """((dB A + B dA − dB dA) ∘ (W + scale B A))² (Zhang et al., 2023); B [out, r], A [r, in].

    The first factor is what one step of gradient descent would take away from B A, up to the step
    size; it stands for dL/dW, which a frozen weight does not have.
    """
    b, a, db, da = (part.float() for part in (b, a, b_gradient, a_gradient))
    gradient = db @ a + b @ da - db @ da
    return (gradient * (weight.float() + scale * (b @ a))).square()


def top_mask(scores: Tensor, keep: int) -> Tensor:
    """True for the `keep` largest of each row [rows, columns]; of equals the leftmost."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def two_of_four_mask(scores: Tensor) -> Tensor:
    """True for the two largest of every four neighbours in a row; of equals the leftmost.

    A row whose length is no multiple of four ends in a shorter group, of which also two are kept.
    """
    rows, columns = scores.shape
    padding = -columns % 4
    lowest = scores.new_full((rows, padding), -torch.inf)  # never among the two, there being two
    groups = torch.cat([scores, lowest], dim=1).reshape(-1, 4)
    return top_mask(groups, 2).reshape(rows, columns + padding)[:, :columns].contiguous()
