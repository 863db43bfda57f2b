"""The loss at W + scale * z without touching W, and a walk that moves W.

Perturbing in place and back does not restore a weight, and a second copy of the model is what a small
device lacks. Here forward passes of modules are exchanged for the duration of a ``with`` block:
``Rank1Pass`` puts rank-1 probes beside the layers, ``LayerPass`` makes one layer's perturbed weights at
a time, ``FactorPass`` perturbs small factors beside a frozen base. On leaving the block every module
has its own forward pass again, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

import fedkernels as fk
from aggregators import Layout
from aggregators.methods import FactorMethod
from fedclient.local.factor_pass import FactorPass
from fedclient.local.forward import Batch
from fedclient.local.layer_pass import LayerPass
from fedclient.local.objectives import Predictions
from fedclient.local.placement import place
from fedclient.local.rank1_pass import NotPaired, Point, Rank1Pass
from fedclient.local.scope import Scope
from fedclient.local.walk import Terms

Pass = Rank1Pass | LayerPass | FactorPass


class Perturbable:
    """A model that can be asked about other weights near its own; made by ``perturbable``.

    ``otherwise`` makes the pass that takes over where the first one is not for this model.
    """

    def __init__(
        self, model: nn.Module, first: Pass, otherwise: Callable[[], Pass] | None = None
    ) -> None:
        self._pass, self._otherwise = first, otherwise
        self._own = {module: module.__dict__.get("forward") for module in model.modules()}
        self._install()

    @property
    def paired(self) -> bool:
        """Whether the points of one call share a forward pass."""
        return isinstance(self._pass, Rank1Pass)

    def predictions(self, batch: Batch, points: Sequence[Point]) -> list[Predictions]:
        """What the model with the weights W + scale * z(seed) says, for every point (seed, scale).

        batch: input_ids, attention_mask and labels, each int64 [batch, length]; -100 is no label.
        """
        with torch.no_grad():
            try:
                return self._pass.predictions(batch, points)
            except NotPaired:
                if self._otherwise is None:
                    raise
                # Found by the first pass, before any step: there is no walk yet to carry over.
                self._remove()
                self._pass = self._otherwise()
                self._install()
                return self._pass.predictions(batch, points)

    def move(self, terms: Terms) -> None:
        """Move the weights by sum_k amount_k z_k; ``terms``: amount by seed.

        Weights that cannot hold small steps (quantised, bfloat16) keep them beside for as long as the
        block lasts; the others hold the walk when it ends.
        """
        with torch.no_grad():
            self._pass.move(terms)

    def close(self) -> None:
        """Take pending steps into the weights and give the modules their own forward passes."""
        with torch.no_grad():
            self._pass.settle()
        self._remove()

    def _install(self) -> None:
        for module, forward in self._pass.forwards.items():
            module.__dict__["forward"] = forward

    def _remove(self) -> None:
        for module, forward in self._own.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextmanager
def perturbable(
    model: nn.Module,
    layout: Layout,
    probe: str,
    names: Sequence[str] | None = None,
    scope: Scope | None = None,
) -> Iterator[Perturbable]:
    """Make ``model`` answer for W + scale * z, z the probes of the tensors ``names`` (None: all).

    ``scope``: which of the probes move what of these tensors, None: all of them everything.

    Known modules run fused for as long (`fk.accelerate`), in evaluation mode. Raises PlacementError
    where the model lacks a tensor of the layout.
    """
    scope = scope or Scope(layout, names)
    placed = place(model, layout, scope.names)
    with _evaluating(model):

        def layer_by_layer() -> Pass:
            return LayerPass(model, placed, probe, scope)

        try:
            if probe != "rank1" or scope.masked:
                raise NotPaired("only whole rank-1 probes stand beside a layer")
            asked = Perturbable(model, Rank1Pass(model, placed, scope), layer_by_layer)
        except NotPaired:
            asked = Perturbable(model, layer_by_layer())
        try:
            yield asked
        finally:
            asked.close()


@contextmanager
def factored(
    model: nn.Module, layout: Layout, factors: Layout, method: FactorMethod, scope: Scope
) -> Iterator[Perturbable]:
    """Make ``model`` answer for factors B + scale * z beside its matrices; nothing of it is moved.

    ``factors``: the layout of B, which ``scope`` is of. Else as ``perturbable``.
    """
    with _evaluating(model):
        asked = Perturbable(model, FactorPass(model, layout, factors, method, scope))
        try:
            yield asked
        finally:
            asked.close()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and fused; every module is as it was when the block ends."""
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    training = {module: module.training for module in before}
    model.eval()
    try:
        fk.accelerate(model)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
            module.training = training[module]
