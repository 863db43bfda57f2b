"""Adam's running means of a gradient (Kingma and Ba, 2015), of whatever is trained by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass
class Moments:
    """Adam's two running means of one tensor's gradient, and how many gradients they have seen."""

    first: Tensor
    second: Tensor
    steps: int = 0

    @classmethod
    def like(cls, gradient: Tensor) -> Moments:
        """Before the first gradient."""
        return cls(torch.zeros_like(gradient), torch.zeros_like(gradient))

    def direction(self, gradient: Tensor) -> Tensor:
        """Take a gradient in; the step for a learning rate of one, against it."""
        self.steps += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        root = (self.second / (1 - BETAS[1] ** self.steps)).sqrt_().add_(EPSILON)
        return self.first / (1 - BETAS[0] ** self.steps) / root
