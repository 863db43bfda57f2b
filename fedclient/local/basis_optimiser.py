"""Steps that stay within a public basis, so that a sketch of their sum is the sum itself.

For a matrix [m, n] with sides Q [n, r] and Y [m, l] the changes that a sketch tells exactly are

    D = Y M + N Q^T,    M [l, n],  N [m, r],  Y^T N = 0,

and these are what is trained: Adam's moments are those of M and N, l n + m r numbers each instead of
m n, and nothing is left out that error feedback would have to bring later. What M's and N's gradients
show of directions outside (Y^T G and G Q) is what the next basis turns towards, as with free steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aggregators.basis import Basis, Sides
from aggregators.methods import Optimiser
from fedclient.local.moments import Moments


class WithinBasis(torch.optim.Optimizer):
    """AdamW without decay, or plain gradient descent, whose steps a sketch in ``basis`` tells exactly.

    ``parameters``: name -> float32 tensor; those that the basis sends whole are trained as they are.
    With "sgd" a step is the gradient's projection. With "adamw" M's and N's elements are fewer than the
    matrix's, and each moves further by a factor that makes the step as long as AdamW's on the elements
    of the matrix: one learning rate serves both.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        learning_rate: float,
        optimiser: Optimiser,
        basis: Basis,
    ) -> None:
        super().__init__(list(parameters.values()), {"lr": learning_rate})
        self.names, self.optimiser = list(parameters), optimiser
        self.sides = {
            name: Sides(*(side.to(parameter.device) for side in (found.Q, found.Y)))
            for name, parameter in parameters.items()
            if (found := basis.sides.get(name)) is not None
        }
        self.moments: dict[tuple[str, str], Moments] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        (group,) = self.param_groups
        for name, parameter in zip(self.names, group["params"], strict=True):
            if parameter.grad is not None:
                parameter.sub_(self._direction(name, parameter.grad), alpha=group["lr"])

    def _direction(self, name: str, gradient: Tensor) -> Tensor:
        if name not in self.sides:
            return self._moved(name, "whole", gradient)
        q, y = self.sides[name].Q, self.sides[name].Y
        seen = y.T @ gradient
        rows = self._moved(name, "M", seen)
        columns = self._moved(name, "N", (gradient - y @ seen) @ q)
        # Adam's element-wise division has turned N towards Y's columns, which are M's.
        columns = columns - y @ (y.T @ columns)
        found = torch.addmm(y @ rows, columns, q.T)
        if self.optimiser == "sgd":
            return found
        return found.mul_(math.sqrt(gradient.numel() / (rows.numel() + columns.numel())))

    def _moved(self, name: str, part: str, gradient: Tensor) -> Tensor:
        if self.optimiser == "sgd":
            return gradient
        key = (name, part)
        if key not in self.moments:
            self.moments[key] = Moments.like(gradient)
        return self.moments[key].direction(gradient)
