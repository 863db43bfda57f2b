"""Local first-order training of the weights themselves, on a copy of the model that is the node's own.

What is sent is the change, so weights of a short type have a master copy in float32 here: a step of
1e-3 of a weight is mostly lost when it is rounded to bfloat16, and 200 such steps are lost 200 times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from aggregators import Basis, Layout, match_targets
from aggregators.methods import FirstOrderMethod
from fedclient.local import subsets
from fedclient.local.basis_optimiser import WithinBasis
from fedclient.local.lora import Batch
from fedclient.local.low_rank_adamw import LowRankAdamW
from fedclient.local.result import TrainingResult
from fedclient.loss import answer_loss


class TrainingError(Exception):
    """Why this plan's training cannot be done, or came to nothing."""


def train(
    model: nn.Module,
    layout: Layout,
    batches: Iterable[Batch],
    method: FirstOrderMethod,
    *,
    seed: int,
    learning_rate: float,
    steps: int,
    basis: Basis | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[dict[str, Tensor], TrainingResult]:
    """Train ``model`` where it stands, one optimiser step a batch, and return what that changed.

    The change is after minus before: name -> float32 of the layout's shape, for the tensors that were
    trained: those of ``method.target_modules`` that ``method.subset`` chose, tied weights once. No
    weight decay, no dropout. ``seed`` is that of the choice and of GaLore's range finder. ``basis``:
    what steps stay within; None: they are free.

    Raises TrainingError where the targets match nothing, where there is no batch, and for a loss that
    is NaN or infinite: such a change is of no use to anyone.
    """
    parameters = dict(model.named_parameters())
    names = targets(layout, method.target_modules)
    mode = model.training
    model.eval()
    try:
        stream = iter(itertools.islice(batches, steps))
        first = next(stream, None)
        if first is None:
            raise TrainingError("there is no batch to train on")
        chosen = _choose(model, layout, names, first, method, seed)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
        return _train(
            model,
            {name: parameters[name] for name in chosen},
            itertools.chain([first], stream),
            _optimiser(method, learning_rate, seed, basis),
            steps,
            progress,
        )
    finally:
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(False)
        model.train(mode)


def targets(layout: Layout, target_modules: Sequence[str]) -> list[str]:
    """The tensors that a list of module names means; () is all of them, vectors too."""
    names = match_targets(layout, target_modules) if target_modules else [s.name for s in layout]
    if not names:
        raise TrainingError(f"target_modules {list(target_modules)} match no tensor of this model")
    return names


def _choose(
    model: nn.Module,
    layout: Layout,
    names: list[str],
    batch: Batch,
    method: FirstOrderMethod,
    seed: int,
) -> list[str]:
    share = method.subset_share
    if method.subset == "owlore":
        outliers = subsets.outlier_shares(model, layout, batch)
        return subsets.owlore(layout, names, seed, share, outliers)
    if method.subset == "hft":
        return subsets.hft(layout, names, seed)
    if method.subset == "green-trainer":
        gains = _squared_gradients(model, names, batch)
        return subsets.green_trainer(layout, names, gains, share)
    return names


def _squared_gradients(model: nn.Module, names: list[str], batch: Batch) -> dict[str, float]:
    """||gradient||^2 of each tensor: what a small step along it gains, by its size.

    Each gradient is freed as soon as it is known, so that all of them never exist at once.
    """
    parameters = dict(model.named_parameters())
    found = dict.fromkeys(names, 0.0)
    handles = []
    for name in names:
        parameter = parameters[name].requires_grad_(True)

        def measure(leaf: Tensor, name: str = name) -> None:
            assert leaf.grad is not None
            found[name] += float(leaf.grad.double().square().sum())
            leaf.grad = None

        handles.append(cast(Any, parameter).register_post_accumulate_grad_hook(measure))
    loss_sum, labelled, _ = answer_loss(model, batch)
    cast(Any, loss_sum / max(1, labelled)).backward()
    for handle in handles:
        handle.remove()
    for name in names:
        parameters[name].requires_grad_(False)
    return found


def _optimiser(
    method: FirstOrderMethod, learning_rate: float, seed: int, basis: Basis | None
) -> Callable[[dict[str, Tensor]], torch.optim.Optimizer]:
    def make(named: dict[str, Tensor]) -> torch.optim.Optimizer:
        if basis is not None:
            return WithinBasis(named, learning_rate, method.optimiser, basis)
        weights = list(named.values())
        if method.optimiser == "sgd":
            return torch.optim.SGD(weights, lr=learning_rate)
        if method.gradient_rank is not None:
            return LowRankAdamW(weights, learning_rate, method.gradient_rank, seed)
        return torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)

    return make


def _train(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: Iterator[Batch],
    make: Callable[[dict[str, Tensor]], torch.optim.Optimizer],
    steps: int,
    progress: Callable[[int, int, float], None] | None,
) -> tuple[dict[str, Tensor], TrainingResult]:
    before = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
    # float32 weights are their own master copy.
    master = {
        name: parameter if parameter.dtype == torch.float32 else before[name].clone()
        for name, parameter in parameters.items()
    }
    optimiser = make(master)
    losses: list[float] = []
    tokens = 0
    for batch in batches:
        loss_sum, labelled, _ = answer_loss(model, batch)
        loss = loss_sum / max(1, labelled)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"the loss of step {len(losses)} is {losses[-1]}")
        cast(Any, loss).backward()
        _step(parameters, master, optimiser)
        tokens += labelled
        if progress is not None:
            progress(len(losses), steps, losses[-1])
    change = {name: before[name].neg_().add_(master[name].detach()) for name in parameters}
    return change, TrainingResult(losses[0], losses[-1], tokens, len(losses))


@torch.no_grad()
def _step(
    parameters: dict[str, nn.Parameter],
    master: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Step the master copy, and round it into the model where the model is not the master."""
    for name, parameter in parameters.items():
        if master[name] is not parameter and parameter.grad is not None:
            master[name].grad = parameter.grad.float()
    optimiser.step()
    for name, parameter in parameters.items():
        if master[name] is not parameter:
            parameter.copy_(master[name])
            master[name].grad = None
        parameter.grad = None
