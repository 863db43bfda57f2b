"""Local training by forward passes alone: steps along probes of a pool that the whole run shares.

MeZO (Malladi et al., 2023) on the seeds of FedKSeed (Qin et al., 2024): what the node learnt is one
number for each probe that it used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from aggregators import FactorScalars, Layout, SeedScalars
from aggregators.methods import FactorMethod, ZerothOrderMethod
from aggregators.seed_sampling import drawn_indices
from aggregators.seed_statistics import SeedStatistics
from aggregators.shared_factors import factor_layout
from aggregators.targets import trained_names
from fedclient.local.estimators import ESTIMATORS, Measured, Point, Step
from fedclient.local.objectives import OBJECTIVES
from fedclient.local.perturbation import Perturbable, factored, perturbable
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
    levels: bytes | None = None,
) -> tuple[SeedScalars | FactorScalars, TrainingResult]:
    """Take ``steps`` steps, a batch each, and return their sum and how it went.

    The walk moves ``model``, where its weights can hold small steps (float32); beside others it is kept
    for as long as this call lasts. Measuring never changes a weight, and a walk
    of factors (``FactorMethod``) none at all.

    Args:
        model: a causal language model of Hugging Face with the node's own weights at the start, or a
            quantised base with the run's change beside it (``fedclient.beside``).
        layout: that of the base model; a quantised model still has the layout of the whole one.
        batches: input_ids, attention_mask and labels, each int64 [batch, length].
        seed: decides which probes of the pool are drawn, the same on every machine.
        levels: how likely each seed of the pool is drawn (``seed_sampling``); None: all alike.
        progress: hears (step, steps, mean loss) after every step.

    Raises:
        ZerothOrderError: the targets are not in the model, or nothing that was measured is finite.
    """
    own = _layout_of(layout, method)
    scope = scope_of(layout, own, method)
    if isinstance(method, FactorMethod):
        perturbed = factored(model, layout, own, method, scope)
    else:
        perturbed = perturbable(model, layout, method.probe, scope=scope)
    walk = Walk(own, method, scope, seed=seed, learning_rate=learning_rate, levels=levels)
    losses: list[float] = []
    tokens = skipped = taken = 0
    try:
        with perturbed as asked:
            for step, batch in enumerate(islice(batches, steps)):
                result = walk.step(asked, batch)
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
    if not walk.measured:
        raise ZerothOrderError(f"none of {skipped} measurements had a finite result")
    update: SeedScalars | FactorScalars = walk.update()
    if isinstance(method, FactorMethod):
        names = [spec.name for spec in own]
        update = FactorScalars(
            layout, names, method.rank, method.scale, method.shared_seed, walk.update()
        )
    return update, TrainingResult(losses[0], losses[-1], tokens, taken, skipped)


class Walk:
    """Steps along probes of a pool, and their sum; arguments as of ``train``."""

    def __init__(
        self,
        layout: Layout,
        method: ZerothOrderMethod,
        scope: Scope,
        *,
        seed: int,
        learning_rate: float,
        levels: bytes | None,
    ) -> None:
        self._layout, self._method, self._scope = layout, method, scope
        self._learning_rate = learning_rate
        self._draws = drawn_indices(seed, method.pool_size, levels)
        self._estimator = ESTIMATORS[method.estimator](method)
        self._objective = OBJECTIVES[method.objective]
        self._seeds: dict[int, int] = {}
        self._scalars: dict[int, float] = {}
        self._measured: dict[int, list[float]] = {}

    def step(self, asked: Perturbable, batch: Batch) -> Step:
        """Measure along the next probes and move the weights by what the estimator makes of it."""
        indices = _distinct(self._draws, self._method)
        for k in indices:
            self._seeds[k] = self._scope.seed(k)

        def measure(points: Sequence[Point]) -> list[Measured]:
            found = asked.predictions(batch, [(self._seeds[k], scale) for k, scale in points])
            return [Measured(self._objective(said), said.loss) for said in found]

        result = self._estimator(measure, indices, self._learning_rate)
        amounts = {k: -self._learning_rate * c for k, c in result.coefficients.items()}
        asked.move({self._seeds[k]: amount for k, amount in amounts.items()})
        for k, amount in amounts.items():
            self._scalars[k] = self._scalars.get(k, 0.0) + amount
        for k, slope in result.slopes.items():
            self._measured.setdefault(k, []).append(slope)
        return result

    @property
    def measured(self) -> bool:
        """Whether any slope was; where all are 0, the walk is no step at all, and rightly so."""
        return bool(self._measured)

    def update(self) -> SeedScalars:
        """The sum of all steps, and what was measured where the method asks for it."""
        method, scalars = self._method, self._scalars
        used = sorted(k for k, amount in scalars.items() if amount != 0.0)
        statistics = None
        if method.sampling == "magnitude":
            assert method.clip is not None
            # Also of a seed along which nothing was learnt: a slope of 0 is a measurement.
            used = sorted({*used, *self._measured})
            found = SeedStatistics.of(method.clip, method.pool_size, self._measured)
            statistics = found.on(torch.tensor(used, dtype=torch.int64))
        return SeedScalars(
            self._layout, method.master_seed, method.pool_size, used,
            [scalars.get(k, 0.0) for k in used], method.probe, self._scope.names, statistics,
            method.reach,
        )  # fmt: skip


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


def _layout_of(layout: Layout, method: ZerothOrderMethod) -> Layout:
    """The layout whose tensors the probes are of: the weights', or that of their factors."""
    if not isinstance(method, FactorMethod):
        return layout
    names = _names(layout, method)
    try:
        return factor_layout(layout, names, method.rank)
    except ValueError as error:
        raise ZerothOrderError(str(error)) from None


def _names(layout: Layout, method: ZerothOrderMethod) -> list[str]:
    names = trained_names(layout, method.target_modules, method.layers)
    if not names:
        layers = f" in the layers {list(method.layers)}" if method.layers else ""
        raise ZerothOrderError(
            f"target_modules {list(method.target_modules)} match no matrix of this model{layers}"
        )
    return names


def scope_of(layout: Layout, own: Layout, method: ZerothOrderMethod) -> Scope:
    """What the method's probes reach; ``own`` is the layout that they are of."""
    names = _names(layout, method)
    whole = len(names) == len(own)
    try:
        return Scope(own, None if whole else names, method.master_seed, method.reach)
    except ValueError as error:
        raise ZerothOrderError(str(error)) from None
