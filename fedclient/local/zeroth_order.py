"""Local training by forward passes alone: steps along probes of a pool that the whole run shares.

MeZO (Malladi et al., 2023) on the seeds of FedKSeed (Qin et al., 2024): what the node learnt is one
number for each probe that it used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from aggregators import Layout, SeedScalars
from aggregators.methods import ZerothOrderMethod
from aggregators.seed_sampling import drawn_indices
from aggregators.seed_statistics import SeedStatistics
from aggregators.targets import trained_names
from fedclient.local.estimators import ESTIMATORS, Measured, Point
from fedclient.local.objectives import OBJECTIVES
from fedclient.local.perturbation import perturbable
from fedclient.local.placement import PlacementError
from fedclient.local.result import TrainingResult
from fedclient.local.scope import Scope
from fedclient.loss import IGNORED

Batch = dict[str, Tensor]


class ZerothOrderError(Exception):
    """Why this model cannot be trained as the method asks."""


def train(
    model: nn.Module,
    layout: Layout,
    batches: Iterable[Batch],
    method: ZerothOrderMethod,
    *,
    seed: int,
    learning_rate: float,
    steps: int,
    progress: Callable[[int, int, float], None] | None = None,
    start: Mapping[int, float] | None = None,
    levels: bytes | None = None,
) -> tuple[SeedScalars, TrainingResult]:
    """Take ``steps`` steps, a batch each, and return their sum and how it went.

    The walk moves ``model``, where its weights can hold small steps (float32); beside others it is kept
    for as long as this call lasts. Measuring never changes a weight.

    Args:
        model: a causal language model of Hugging Face with the node's own weights at the start.
        layout: that of the base model; a quantised model still has the layout of the whole one.
        batches: input_ids, attention_mask and labels, each int64 [batch, length].
        seed: decides which probes of the pool are drawn, the same on every machine.
        start: amounts by pool index of a change that ``model`` does not have yet, and that is no part of
            the update: the run's, for a base that cannot hold it.
        levels: how likely each seed of the pool is drawn (``seed_sampling``); None: all alike.
        progress: hears (step, steps, mean loss) after every step.

    Raises:
        ZerothOrderError: the targets are not in the model, or no step had a finite loss.
    """
    scope = _scope(layout, method)
    probe_seed: dict[int, int] = {}
    draws = drawn_indices(seed, method.pool_size, levels)
    estimator = ESTIMATORS[method.estimator](method)
    objective = OBJECTIVES[method.objective]
    scalars: dict[int, float] = {}
    measured: dict[int, list[float]] = {}
    losses: list[float] = []
    tokens = skipped = taken = 0
    try:
        with perturbable(model, layout, method.probe, scope=scope) as asked:
            asked.move({scope.seed(k): amount for k, amount in (start or {}).items()})
            for step, batch in enumerate(islice(batches, steps)):
                indices = _distinct(draws, method)
                for k in indices:
                    probe_seed[k] = scope.seed(k)

                def measure(points: Sequence[Point], batch: Batch = batch) -> list[Measured]:
                    seeds = [(probe_seed[k], scale) for k, scale in points]
                    found = asked.predictions(batch, seeds)
                    return [Measured(objective(said), said.loss) for said in found]

                result = estimator(measure, indices, learning_rate)
                amounts = {
                    k: -learning_rate * coefficient
                    for k, coefficient in result.coefficients.items()
                }
                asked.move({probe_seed[k]: amount for k, amount in amounts.items()})
                for k, amount in amounts.items():
                    scalars[k] = scalars.get(k, 0.0) + amount
                for k, slope in result.slopes.items():
                    measured.setdefault(k, []).append(slope)
                taken, skipped = step + 1, skipped + result.skipped
                tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
                if math.isfinite(result.loss):
                    losses.append(result.loss)
                if progress is not None:
                    progress(taken, steps, result.loss)
    except PlacementError as error:
        raise ZerothOrderError(str(error)) from None
    if not losses:
        raise ZerothOrderError(f"none of {taken} steps had a finite loss")
    used = sorted(k for k, amount in scalars.items() if amount != 0.0)
    statistics = None
    if method.sampling == "magnitude":
        assert method.clip is not None
        # Also of a seed along which nothing was learnt: a slope of 0 is a measurement.
        used = sorted({*used, *measured})
        statistics = SeedStatistics.of(method.clip, method.pool_size, measured).on(
            torch.tensor(used)
        )
    update = SeedScalars(
        layout, method.master_seed, method.pool_size, used, [scalars.get(k, 0.0) for k in used],
        method.probe, scope.names, statistics, method.reach,
    )  # fmt: skip
    return update, TrainingResult(losses[0], losses[-1], tokens, taken, skipped)


def _distinct(draws: Iterator[int], method: ZerothOrderMethod) -> list[int]:
    """The probes of one step: the next ones drawn, each once, of the block of the first.

    So a block is drawn by how likely its probes are.
    """
    first = next(draws)
    blocks = method.reach.blocks
    in_block = len(range(first % blocks, method.pool_size, blocks))
    chosen: dict[int, None] = {first: None}
    while len(chosen) < min(method.directions, in_block):
        if (index := next(draws)) % blocks == first % blocks:
            chosen[index] = None
    return list(chosen)


def _scope(layout: Layout, method: ZerothOrderMethod) -> Scope:
    names = trained_names(layout, method.target_modules, method.layers)
    if not names:
        layers = f" in the layers {list(method.layers)}" if method.layers else ""
        raise ZerothOrderError(
            f"target_modules {list(method.target_modules)} match no matrix of this model{layers}"
        )
    whole = len(names) == len(layout)
    try:
        return Scope(layout, None if whole else names, method.master_seed, method.reach)
    except ValueError as error:
        raise ZerothOrderError(str(error)) from None
