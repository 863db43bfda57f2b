"""AdamW whose moments live in a few directions of each gradient (GaLore, Zhao et al., 2024).

For a gradient G [m, n] with m <= n, Adam runs on S^T G [r, n], S the leading left singular vectors of
an earlier G, and the step is S times Adam's; where m > n, right ones. Two moments take 2 r n numbers
instead of 2 m n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import fedkernels as fk
from fedclient.local.moments import Moments

# Steps for which the directions are kept; the paper's.
REFRESH = 200
# Columns beside the rank, and rounds of power iteration, of the randomised range finder.
OVERSAMPLING, ITERATIONS = 4, 2


class LowRankAdamW(torch.optim.Optimizer):
    """AdamW without decay; matrices with more than ``rank`` rows and columns in low rank.

    The paper's factor alpha is one with the learning rate. ``seed`` is that of the range finder's
    start; the moments stay when the directions are refreshed, as in the paper's code.
    """

    def __init__(
        self, parameters: Iterable[Tensor], learning_rate: float, rank: int, seed: int
    ) -> None:
        super().__init__(list(parameters), {"lr": learning_rate})
        self.rank, self.seed = rank, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._step(number, parameter, group["lr"])

    def _step(self, number: int, parameter: Tensor, learning_rate: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        steps = state["steps"] = state.get("steps", 0) + 1
        wide = parameter.ndim == 2 and parameter.shape[0] <= parameter.shape[1]
        low = parameter.ndim == 2 and min(parameter.shape) > self.rank
        if low:
            if steps % REFRESH == 1:
                matrix = gradient if wide else gradient.T
                seed = fk.derive_seed(self.seed, steps)
                state["directions"] = leading_directions(matrix, self.rank, seed, number)
            directions = state["directions"]
            gradient = directions.T @ gradient if wide else gradient @ directions
        if steps == 1:
            state["moments"] = Moments.like(gradient)
        change = state["moments"].direction(gradient)
        if low:
            change = directions @ change if wide else change @ directions.T
        parameter.sub_(change, alpha=learning_rate)


def leading_directions(matrix: Tensor, rank: int, seed: int, tensor_id: int) -> Tensor:
    """The leading left singular vectors [m, rank] of a matrix [m, n], by randomised power iteration."""
    width = min(rank + OVERSAMPLING, *matrix.shape)
    start = fk.noise(seed, tensor_id, (width, matrix.shape[1]), "gaussian", device=matrix.device)
    found = torch.linalg.qr(matrix @ start.T.to(matrix.dtype)).Q
    for _ in range(ITERATIONS):
        found = torch.linalg.qr(matrix @ (matrix.T @ found)).Q
    left, _, _ = torch.linalg.svd(found.T @ matrix, full_matrices=False)
    leading: Tensor = found @ left[:, :rank]
    return leading
