"""Hybrid training: zeroth-order steps in the lower layers, LoRA by backpropagation in the upper ones.

The idea is that of ZO-Bench (Zhang et al., 2024, section 5). Activations are kept from the cut on, for
only there something needs a gradient; below it two forward passes measure a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from aggregators import Layout, LowRank, Pair
from aggregators.messages import Plan
from aggregators.methods import HybridMethod
from fedclient.local import lora
from fedclient.local.perturbation import perturbable
from fedclient.local.placement import place
from fedclient.local.result import TrainingResult
from fedclient.local.walk import holds_walk
from fedclient.local.zeroth_order import Walk, ZerothOrderError, scope_of
from fedclient.loss import IGNORED, answer_loss


def train(
    model: nn.Module,
    layout: Layout,
    batches: Iterable[dict[str, Tensor]],
    plan: Plan,
    levels: bytes | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Pair, TrainingResult]:
    """Take the plan's steps, a batch each, and return what both parts learnt.

    model: the node's own, which the walk below the cut moves. Both parts see the loss at the point where
    the step began; then both move.

    Raises:
        ZerothOrderError: a lower weight cannot hold small steps, or no step had a finite loss.
        AdapterError: no upper layer can be adapted.
    """
    method = plan.method
    assert isinstance(method, HybridMethod)
    scope = scope_of(layout, layout, method.lower)
    for placed in place(model, layout, scope.names):
        if not holds_walk(placed.weight):
            raise ZerothOrderError(
                f"layer {placed.spec.name!r} cannot hold the small steps of hybrid training; set"
                ' base_dtype = "float32"'
            )
    walk = Walk(
        layout, method.lower, scope,
        seed=plan.seed, learning_rate=plan.learning_rate, levels=levels,
    )  # fmt: skip
    upper = plan.model_copy(update={"method": method.upper})
    losses: list[float] = []
    tokens = skipped = taken = 0
    with lora.adapted(model, layout, upper, None) as wrapped:
        optimiser = torch.optim.AdamW(
            [p for p in wrapped.parameters() if p.requires_grad],
            lr=method.upper_learning_rate,
            weight_decay=method.upper.weight_decay,
            fused=plan.accelerate,
        )
        for step, batch in enumerate(islice(batches, plan.local_steps)):
            warm = min(1.0, (step + 1) / max(1, method.upper.warmup_steps))
            for group in optimiser.param_groups:
                group["lr"] = method.upper_learning_rate * warm
            optimiser.zero_grad(set_to_none=True)
            wrapped.train(method.upper.dropout > 0)
            loss_sum, labelled, _ = answer_loss(wrapped, batch)
            loss = loss_sum / max(1, labelled)
            cast(Any, loss).backward()
            # Steps below the cut are in the weights when the block ends.
            with perturbable(model, layout, method.lower.probe, scope=scope) as asked:
                skipped += walk.step(asked, batch).skipped
            optimiser.step()
            taken = step + 1
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
            found = float(loss.detach())
            if math.isfinite(found):
                losses.append(found)
            if progress is not None:
                progress(taken, plan.local_steps, found)
        wrapped.eval()
        factors = LowRank(layout, lora.read_factors(wrapped, layout, upper))
    if not losses:
        raise ZerothOrderError(f"none of {taken} steps had a finite loss")
    result = TrainingResult(losses[0], losses[-1], tokens, taken, skipped)
    return Pair([walk.update(), factors]), result
