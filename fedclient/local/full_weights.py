"""Training on full weights: forward passes alone, or backpropagation and a projection of the change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

import fedkernels as fk
from aggregators import Basis, Layout, ProjectedGradient, Sketch, Update
from aggregators.messages import Plan
from aggregators.methods import (
    FactorMethod,
    HybridMethod,
    ProjectedMethod,
    SketchMethod,
    ZerothOrderMethod,
)
from aggregators.view import View
from fedclient.base_model import LoadedModel
from fedclient.beside import standing, standing_on
from fedclient.local import first_order, hybrid, projection, zeroth_order
from fedclient.local.result import TrainingResult
from fedclient.residual import Residuals
from fedclient.state import Weights, forget, is_alone, weights_of


@dataclass(frozen=True)
class FullWeightsTrainer:
    """``model``: the weights of the round's start, for evaluation; ``weights``: their digest.

    A walk has a copy of them, unless ``own``: then nobody else will ask for them, or, as they are
    quantised, no step is folded into them.
    """

    model: nn.Module
    layout: Layout
    plan: Plan
    weights: str
    basis: Basis | None
    own: bool
    levels: bytes | None

    def train(
        self,
        batches: Iterable[dict[str, Tensor]],
        progress: Callable[[int, int, float], None] | None = None,
    ) -> tuple[Update, TrainingResult]:
        """Walk from the weights; return what the plan's method makes of the walk."""
        plan, method = self.plan, self.plan.method
        if not self.own:
            # The model may run fused, and its copy is trained: fused modules are put on anew.
            fk.restore(self.model)
        # Factors are trained beside weights that stay, so these need no copy.
        stays = self.own or isinstance(method, FactorMethod)
        own = self.model if stays else copy.deepcopy(self.model)
        walk: dict[str, Any] = {
            "seed": plan.seed,
            "learning_rate": plan.learning_rate,
            "steps": plan.local_steps,
            "progress": progress,
        }
        if isinstance(method, ZerothOrderMethod):
            return zeroth_order.train(own, self.layout, batches, method, **walk, levels=self.levels)
        if isinstance(method, HybridMethod):
            return hybrid.train(own, self.layout, batches, plan, self.levels, progress)
        assert isinstance(method, (ProjectedMethod, SketchMethod))
        within = isinstance(method, SketchMethod) and method.within
        change, result = first_order.train(
            own, self.layout, batches, method, **walk, basis=self._basis() if within else None
        )
        del own  # the projection needs its room
        update, residual = self._seen(method, change)
        return update, replace(result, residual=residual)

    def _seen(
        self, method: ProjectedMethod | SketchMethod, change: dict[str, Tensor]
    ) -> tuple[ProjectedGradient | Sketch, str]:
        """The change, and what earlier messages left out, as the method sends it; the latter's name."""
        plan = self.plan
        kept = Residuals(plan.run, plan.node)
        before, found = kept.find(plan.history[1:])
        update: ProjectedGradient | Sketch
        if isinstance(method, ProjectedMethod):
            update, left = projection.project(self.layout, method, change, before, plan.wire_dtype)
        else:
            update, left = projection.sketch(
                self.layout, method, self._basis(), change, before, plan.wire_dtype
            )
        if plan.history:
            # A full disk costs the residual, not the answer; the server names who comes without one.
            with suppress(OSError, SafetensorError):
                kept.keep(plan.history[0], left)
        return update, found

    def _basis(self) -> Basis:
        if self.basis is None:
            raise first_order.TrainingError("the plan asks for a sketch and came without a basis")
        return self.basis


@contextmanager
def trainer(
    plan: Plan, base: LoadedModel, layout: Layout, view: View
) -> Iterator[FullWeightsTrainer]:
    """The weights that the view is, run fused where the plan says so until the block ends."""
    quantised = base.format != "full"
    alone = is_alone(plan.node)
    weights = (
        Weights(base.model, standing(base, view).digest)
        if quantised
        else weights_of(base, layout, view)
    )
    with ExitStack() as stack:
        stack.callback(fk.restore, weights.model)
        if plan.accelerate:
            # Before the view stands on the modules, which nobody would go around from then on.
            fk.accelerate(weights.model)
        if quantised:
            stack.enter_context(standing_on(weights.model, layout, standing(base, view)))
        own = quantised or (alone and not view.empty and plan.action == "train")
        if own and not quantised:
            forget()
        yield FullWeightsTrainer(
            weights.model, layout, plan, weights.digest, view.basis, own, view.levels
        )
