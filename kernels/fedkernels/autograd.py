"""What the autograd functions here have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

Step = TypeVar("Step", bound=Callable[..., Any])


def without_autocast(step: Step) -> Step:
    """Return a forward or backward pass of an autograd function that keeps the types of its tensors.

    Autocast would change some of the products inside, and others that add to their results not.
    """

    @functools.wraps(step)
    def run(ctx: Any, *arguments: Any) -> Any:
        device = next(a.device.type for a in arguments if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return step(ctx, *arguments)
        with torch.autocast(device, enabled=False):
            return step(ctx, *arguments)

    return cast(Step, run)


def reshaped(result: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a result that nobody else has, in another shape.

    To autograd it is no view, so operations in place (a ReLU, say) may follow the function.
    """
    plain: torch.Tensor = torch.ops.aten._unsafe_view.default(result, list(shape))
    return plain
