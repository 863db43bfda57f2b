"""Probes of LoRA's B beside a frozen base, whatever it is held in: W x + s (B + scale z) (A x).

A comes from a seed and B starts at zero. Both are small, so nothing of the base is copied or perturbed,
and a walk lies in B itself, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fedkernels as fk
from aggregators import Layout
from aggregators.methods import FactorMethod
from aggregators.shared_factors import shared_a
from fedclient.beside import beside_of
from fedclient.local.forward import Batch, is_conv1d, predictions, rows_of, streaming_head
from fedclient.local.objectives import Predictions
from fedclient.local.placement import Placed, PlacementError, place
from fedclient.local.scope import Scope
from fedclient.local.vocabulary import Logits
from fedclient.local.walk import Terms

Forward = Callable[..., Any]
Point = tuple[int, float]  # seed, scale: the factors B + scale * z(seed)


class FactorPass:
    """A model with factors beside the matrices of ``factors``, the layout of their B.

    ``forwards`` are the stand-ins for the modules' own. Raises PlacementError for a tensor that the
    model does not have.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, factors: Layout, method: FactorMethod, scope: Scope
    ) -> None:
        self._model = model
        self._factors = [
            _Factor(placed, layout, factors, method, scope)
            for placed in place(model, layout, [spec.name for spec in factors])
        ]
        self._head = streaming_head(model)
        if self._head is not None and beside_of(self._head) is not None:
            self._head = None  # its weight is not all that it multiplies with
        self._forwards: dict[nn.Module, Forward] = {}
        for factor in self._factors:
            for module in factor.holders:
                self._forwards[module] = factor.beside(module)
                if module is self._head:
                    self._head = None  # a product of its own rows would leave the factors out

    @property
    def forwards(self) -> Mapping[nn.Module, Forward]:
        """The forward pass that stands in for each module's own."""
        return self._forwards

    def predictions(self, batch: Batch, points: Sequence[Point]) -> list[Predictions]:
        """The model's predictions at every point; the factors stay as they are."""
        found: list[Predictions] = []
        for seed, scale in points:
            for factor in self._factors:
                factor.stand_at(seed, scale)
            found += predictions(self._model, batch, 1, self._head_logits if self._head else None)
        return found

    def move(self, terms: Terms) -> None:
        """Move the factors by sum_k amount_k z_k."""
        for factor in self._factors:
            factor.move(terms)

    def settle(self) -> None:
        """Nothing is pending: every step is taken at once."""

    def _head_logits(self, rows: Tensor) -> Logits:
        head: Any = self._head
        weight = head.quantized if hasattr(head, "quantized") else head.weight
        return lambda first, past: rows @ rows_of(weight, first, past, rows.dtype).T


class _Factor:
    """B [out, r] in float32, beside the A [r, in] of one matrix [out, in] of the layout."""

    def __init__(
        self, placed: Placed, layout: Layout, factors: Layout, method: FactorMethod, scope: Scope
    ) -> None:
        name = placed.spec.name
        self.holders = [module for module, _ in placed.holders]
        for module in self.holders:
            if not (isinstance(module, (nn.Linear, fk.QuantizedLinear)) or is_conv1d(module)):
                raise PlacementError(
                    f"layer {name!r} is used by a {type(module).__name__}; factors stand beside linear"
                    " layers: take it out of target_modules"
                )
        self._spec = factors.tensors[factors.tensor_id(name)]
        self._probe, self._scale, self._scope = method.probe, method.scale, scope
        rank, columns = self._spec.shape[1], layout.shape(name)[1]
        self._a = shared_a(method.shared_seed, placed.spec.tensor_id, rank, columns)
        self._b = torch.zeros(self._spec.shape)
        self._seen = self._b

    def beside(self, module: Any) -> Forward:
        """A forward pass that adds what the factors make of a module's input."""
        own: Forward = module.forward
        # A Conv1D keeps its weight as [in, out], and so does the layout.
        transposed = is_conv1d(module)

        def forward(x: Tensor) -> Tensor:
            b, a = self._seen.to(x.dtype), self._a.to(x.dtype)
            thin = (x @ b) @ a if transposed else (x @ a.T) @ b.T
            result: Tensor = own(x).add_(thin, alpha=self._scale)
            return result

        forward.stands_in = True  # type: ignore[attr-defined]
        return forward

    def stand_at(self, seed: int, scale: float) -> None:
        """Make the factor that is seen the one at a point."""
        self._seen = self._b
        if scale != 0.0 and self._scope.reaches(self._spec, seed):
            out = torch.empty_like(self._b)
            self._seen = self._scope.perturbed(
                self._b, seed, scale, self._spec, self._probe, out, None
            )

    def move(self, terms: Terms) -> None:
        """Take steps of the walk."""
        self._scope.move_(self._b, terms, self._spec, self._probe)
