"""Local training by forward passes alone: steps along probes of a pool that the whole run shares.

MeZO (Malladi et al., 2023) on the seeds of FedKSeed (Qin et al., 2024): what the node learnt is one
number for each probe that it used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from torch import Tensor, nn

import fedkernels as fk
from aggregators import Layout, SeedScalars, match_targets
from aggregators.methods import ZerothOrderMethod
from fedclient.local.estimators import ESTIMATORS, Measured, Point
from fedclient.local.objectives import OBJECTIVES
from fedclient.local.perturbation import perturbable
from fedclient.local.placement import PlacementError
from fedclient.local.result import TrainingResult
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
) -> tuple[SeedScalars, TrainingResult]:
    """Take ``steps`` steps, a batch each, and return their sum and how it went.

    The walk moves ``model``, where its weights can hold small steps (float32); beside others it is kept
    for as long as this call lasts. Measuring never changes a weight.

    Args:
        model: a causal language model of Hugging Face with the node's own weights at the start, or a
            quantised base with the run's change beside it (``fedclient.beside``).
        layout: that of the base model; a quantised model still has the layout of the whole one.
        batches: input_ids, attention_mask and labels, each int64 [batch, length].
        seed: decides which probes of the pool are drawn, the same on every machine.
        progress: hears (step, steps, mean loss) after every step.

    Raises:
        ZerothOrderError: the targets are not in the model, or no step had a finite loss.
    """
    names = _scope(layout, method)
    probe_seed: dict[int, int] = {}
    draws = drawn_indices(seed, method.pool_size)
    estimator = ESTIMATORS[method.estimator](method)
    objective = OBJECTIVES[method.objective]
    scalars: dict[int, float] = {}
    losses: list[float] = []
    tokens = skipped = taken = 0
    try:
        with perturbable(model, layout, method.probe, names) as asked:
            for step, batch in enumerate(islice(batches, steps)):
                indices = _distinct(draws, min(method.directions, method.pool_size))
                for k in indices:
                    probe_seed[k] = fk.derive_seed(method.master_seed, k)

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
    update = SeedScalars(
        layout, method.master_seed, method.pool_size, used, [scalars[k] for k in used],
        method.probe, names,
    )  # fmt: skip
    return update, TrainingResult(losses[0], losses[-1], tokens, taken, skipped)


def drawn_indices(seed: int, pool_size: int) -> Iterator[int]:
    """Pool indices without end, uniform and independent: functions of ``seed`` alone.

    Made by the probes' own generator, because torch's differs between machines. That a pool does not
    divide 2**63 favours an index by less than 1e-11.
    """
    count = 0
    while True:
        yield fk.derive_seed(seed, count) % pool_size
        count += 1


def _distinct(draws: Iterator[int], count: int) -> list[int]:
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen[next(draws)] = None
    return list(chosen)


def _scope(layout: Layout, method: ZerothOrderMethod) -> list[str] | None:
    if not method.target_modules:
        return None
    names = match_targets(layout, method.target_modules)
    if not names:
        raise ZerothOrderError(
            f"target_modules {list(method.target_modules)} match no matrix of this model"
        )
    return names
