"""Zeroth-order estimators: from the objective at some points to the coefficients of a step.

    W <- W - learning_rate * sum_k coefficients[k] z_k

| estimator | coefficient of a probe | passes |
|---|---|---|
| `spsa` | g = (l(W + ez) - l(W - ez)) / 2e (MeZO, Malladi et al., 2023, definition 1) | 2 a probe |
| `forward-gradient` | (l(W + ez) - l(W)) / e, one-sided, with a base that probes share | 1 + 1 a probe |
| `fzoo` | the same rise over the standard deviation of all l (FZOO, Dang et al., 2025) | 1 + 1 a probe |
| `sign` | sign(g) (ZO-SGD-Sign of ZO-Bench, Zhang et al., 2024) | 2 a probe |
| `momentum` | of SGD's buffer, m <- momentum m + g z: a sum over the last probes | 2 a probe |
| `adam` | of m / sqrt(v), bias-corrected, with v a scalar | 2 a probe |
| `conservative` | g, 0 or -g, whichever lowers the objective most | 5 a probe |
| `block-wise` | g, of a probe that perturbs one block of layers alone | 2 a probe |
| `sparse` | g, of a probe that perturbs a share of the elements alone, the same all along | 2 a probe |

A directional derivative by forward-mode differentiation (Baydin et al., 2022) would need one by every
fused kernel; the one-sided difference is what it is with an error of order e. Several probes are
averaged. Adam's second moment is that of each coordinate, (g z_i)^2, and a probe of signs has z_i^2 = 1:
there one scalar is exactly Adam's for a single probe a step, and its expected value for several.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aggregators.methods import ZerothOrderMethod

# What of a decaying sum is still applied: 0.9 ** 66 is below it.
NEGLIGIBLE = 1e-3
SECOND_MOMENT_DECAY = 0.999
ADAM_EPSILON = 1e-8

Point = tuple[int, float]  # index of a probe in the pool, scale


@dataclass(frozen=True)
class Measured:
    """The objective at a point, and the mean loss there, in nats a token."""

    objective: float
    loss: float


Measure = Callable[[Sequence[Point]], list[Measured]]


@dataclass(frozen=True)
class Step:
    """A step's coefficients by pool index; ``loss``: mean over the points that were measured.

    ``slopes``: the g of every probe that had a finite one; ``skipped``: how many had none.
    """

    coefficients: dict[int, float]
    loss: float
    slopes: dict[int, float] = field(default_factory=dict)
    skipped: int = 0


class Estimator(Protocol):
    """Measures along the probes ``indices`` and says which step to take."""

    def __call__(self, measure: Measure, indices: Sequence[int], learning_rate: float) -> Step: ...


class Spsa:
    """Two-sided differences; ``estimator`` "sign" keeps their signs alone."""

    def __init__(self, method: ZerothOrderMethod) -> None:
        self._method = method

    def __call__(self, measure: Measure, indices: Sequence[int], learning_rate: float) -> Step:
        """Two measurements a probe."""
        step = two_sided(measure, indices, self._method)
        coefficients = _mean(step.slopes)
        if self._method.estimator == "sign":
            signs = {k: math.copysign(1.0, g) if g else 0.0 for k, g in step.slopes.items()}
            coefficients = _mean(signs)
        return Step(coefficients, step.loss, step.slopes, step.skipped)


class OneSided:
    """One-sided differences; ``estimator`` "fzoo" divides them by the spread of the objectives.

    The step is then as long as the landscape is flat, in units of epsilon: the coefficient of a probe
    is (l_k - l_0) / std. With a single probe that is a sign, scaled.
    """

    def __init__(self, method: ZerothOrderMethod) -> None:
        self._method = method

    def __call__(self, measure: Measure, indices: Sequence[int], learning_rate: float) -> Step:
        """One measurement a probe, and one at W."""
        epsilon = self._method.epsilon
        base, *found = measure([(indices[0], 0.0), *((k, epsilon) for k in indices)])
        rises = {k: at.objective - base.objective for k, at in zip(indices, found, strict=True)}
        slopes, skipped = _usable({k: rise / epsilon for k, rise in rises.items()}, self._method)
        loss = _mean_loss([base, *found])
        if self._method.estimator != "fzoo":
            return Step(_mean(slopes), loss, slopes, skipped)
        spread = (
            statistics.pstdev(
                [base.objective, *(at.objective for at in found if math.isfinite(at.objective))]
            )
            if slopes
            else 0.0
        )
        scaled = {k: epsilon * g / spread for k, g in slopes.items()} if spread > 0 else {}
        return Step(_mean(scaled), loss, slopes, skipped)


class Momentum:
    """SGD with momentum: the buffer is a sum of probes, so a step moves along the last of them all."""

    def __init__(self, method: ZerothOrderMethod) -> None:
        self._method = method
        self._buffer = _Decaying(method.momentum)

    def __call__(self, measure: Measure, indices: Sequence[int], learning_rate: float) -> Step:
        """Two measurements a probe."""
        step = two_sided(measure, indices, self._method)
        coefficients = self._buffer.add(_mean(step.slopes))
        return Step(coefficients, step.loss, step.slopes, step.skipped)


class Adam:
    """Adam (Kingma and Ba, 2015, algorithm 1) with one second moment for all coordinates."""

    def __init__(self, method: ZerothOrderMethod) -> None:
        self._method = method
        self._first = _Decaying(method.momentum)
        self._second = 0.0
        self._steps = 0

    def __call__(self, measure: Measure, indices: Sequence[int], learning_rate: float) -> Step:
        """Two measurements a probe."""
        step = two_sided(measure, indices, self._method)
        if not step.slopes:
            return step
        mean = _mean(step.slopes)
        decay, second_decay = self._method.momentum, SECOND_MOMENT_DECAY
        self._steps += 1
        moment = self._first.add({k: (1 - decay) * g for k, g in mean.items()})
        squared = sum(g * g for g in mean.values())
        self._second = second_decay * self._second + (1 - second_decay) * squared
        size = math.sqrt(self._second / (1 - second_decay**self._steps)) + ADAM_EPSILON
        unbiased = (1 - decay**self._steps) * size
        coefficients = {k: amount / unbiased for k, amount in moment.items()}
        return Step(coefficients, step.loss, step.slopes, step.skipped)


class Conservative:
    """The best of staying, the step, and its opposite (ZO-Bench's ZO-SGD-Cons), probe by probe."""

    def __init__(self, method: ZerothOrderMethod) -> None:
        self._method = method

    def __call__(self, measure: Measure, indices: Sequence[int], learning_rate: float) -> Step:
        """Five measurements a probe."""
        step = two_sided(measure, indices, self._method)
        chosen: dict[int, float] = {}
        for k, coefficient in _mean(step.slopes).items():
            candidates = [0.0, coefficient, -coefficient]
            points = [(k, -learning_rate * candidate) for candidate in candidates]
            values = [
                at.objective if math.isfinite(at.objective) else math.inf for at in measure(points)
            ]
            chosen[k] = candidates[values.index(min(values))]
        return Step(chosen, step.loss, step.slopes, step.skipped)


def two_sided(measure: Measure, indices: Sequence[int], method: ZerothOrderMethod) -> Step:
    """g along every probe, cut to ``method.clip``; the step has no coefficients yet."""
    epsilon = method.epsilon
    found = measure([(k, side * epsilon) for k in indices for side in (1.0, -1.0)])
    slopes, skipped = _usable(
        {
            k: (up.objective - down.objective) / (2 * epsilon)
            for k, up, down in zip(indices, found[::2], found[1::2], strict=True)
        },
        method,
    )
    return Step({}, _mean_loss(found), slopes, skipped)


class _Decaying:
    """sum_t decay^age * (what was added at t), as amounts by pool index."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._added: list[tuple[float, dict[int, float]]] = []

    def add(self, amounts: Mapping[int, float]) -> dict[int, float]:
        kept = [(weight * self._decay, old) for weight, old in self._added]
        self._added = [(weight, old) for weight, old in kept if weight >= NEGLIGIBLE]
        self._added.append((1.0, dict(amounts)))
        total: dict[int, float] = {}
        for weight, old in self._added:
            for k, amount in old.items():
                total[k] = total.get(k, 0.0) + weight * amount
        return total


def _usable(slopes: Mapping[int, float], method: ZerothOrderMethod) -> tuple[dict[int, float], int]:
    """The finite ones, cut to the method's clip, and how many were not finite."""
    limit = math.inf if method.clip is None else method.clip
    finite = {k: max(-limit, min(limit, g)) for k, g in slopes.items() if math.isfinite(g)}
    return finite, len(slopes) - len(finite)


def _mean(slopes: Mapping[int, float]) -> dict[int, float]:
    return {k: g / len(slopes) for k, g in slopes.items()}


def _mean_loss(found: Sequence[Measured]) -> float:
    finite = [at.loss for at in found if math.isfinite(at.loss)]
    return sum(finite) / len(finite) if finite else math.nan


ESTIMATORS: dict[str, Callable[[ZerothOrderMethod], Estimator]] = {
    "spsa": Spsa,
    "sign": Spsa,
    "forward-gradient": OneSided,
    "fzoo": OneSided,
    "momentum": Momentum,
    "adam": Adam,
    "conservative": Conservative,
    # What differs is what a probe reaches (aggregators/reach.py).
    "block-wise": Spsa,
    "sparse": Spsa,
}
