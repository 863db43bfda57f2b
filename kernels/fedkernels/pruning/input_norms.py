"""Norms of what goes into each linear: the data's part of the Wanda score."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class InputNorms:
    """Collects ||x_j||_2 of every linear's inputs while it is open; read it afterwards.

        with InputNorms(model) as norms:
            for batch in batches:
                model(**batch)
        scores = wanda(model.lm_head.weight, norms["lm_head"])

    The norm runs over all positions of all batches, padding included: give batches without padding
    where it should not count. A linear that was never called has no entry.
    """

    def __init__(self, model: nn.Module) -> None:
        self._linears = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        if not self._linears:
            raise ValueError(f"model has no linear layers: it is a {type(model).__name__}")
        self._squares: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        # q, k and v, and gate and up, are given one tensor: its squares are summed once
        self._latest: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> InputNorms:
        for name, module in self._linears.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._latest = None

    def __getitem__(self, name: str) -> Tensor:
        """Norms of the inputs of the linear `name`, float32 [in].

        Raises:
            ValueError: it is not a linear of the model, was never called, or saw a NaN or infinity.
        """
        if name not in self._squares:
            raise ValueError(f"name {name!r} is no linear that was called under this InputNorms")
        norms = self._squares[name].sqrt().float()
        if not norms.isfinite().all():
            raise ValueError(f"name {name!r}: its inputs were not finite")
        return norms

    def __contains__(self, name: object) -> bool:
        return name in self._squares

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = self._squares_of(inputs[0])
            before = self._squares.get(name)
            self._squares[name] = squares if before is None else before + squares

        return add

    @torch.no_grad()
    def _squares_of(self, inputs: Tensor) -> Tensor:
        """Return the sum of squares over all but the last dimension, float64 [in]."""
        if self._latest is None or self._latest[0] is not inputs:
            rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
            self._latest = inputs, rows.square().sum(dim=0).double()
        return self._latest[1]
