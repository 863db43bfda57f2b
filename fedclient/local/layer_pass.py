"""Probes of any kind, layer by layer: a layer's weights are perturbed in scratch while it computes.

The scratch is a block of the largest matrix, so a large embedding or head costs no more than another
layer; rows of an embedding that no token asks for are never made. A module whose weights are used
without calling it (by its parent, say) has them replaced for the whole pass instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fedkernels as fk
from fedclient.beside import beside_of
from fedclient.local.forward import Batch, is_conv1d, predictions, rows_of, streaming_head
from fedclient.local.objectives import Predictions
from fedclient.local.placement import Placed
from fedclient.local.scope import Scope
from fedclient.local.vocabulary import Logits
from fedclient.local.walk import Terms, add_terms, holds_walk

# Elements of the scratch: a large layer's matrix in float32 is made in pieces of 16 MiB.
SCRATCH = 1 << 22

Forward = Callable[..., Any]
Point = tuple[int, float]  # seed, scale: the weights W + scale * z(seed)


class LayerPass:
    """A model at one point after the other; ``forwards`` are the stand-ins for its layers' own."""

    def __init__(
        self, model: nn.Module, placed: Sequence[Placed], probe: str, scope: Scope
    ) -> None:
        self._model, self._placed, self._probe, self._scope = model, placed, probe, scope
        self._point: Point = (0, 0.0)
        self._walk: dict[int, float] = {}
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._called: set[nn.Module] = set()
        self._surveyed = False
        self._held: dict[nn.Module, dict[str, Placed]] = {}
        for tensor in placed:
            for module, attribute in tensor.holders:
                self._held.setdefault(module, {})[attribute] = tensor
        head = streaming_head(model)
        if head is not None and beside_of(head) is not None:
            head = None  # its weight is not all that it multiplies with
        self._head = head if head in self._held else None
        self._other_head = None if head in self._held else head
        self._forwards = {
            module: self._stand_in(module, tensors) for module, tensors in self._held.items()
        }

    @property
    def forwards(self) -> dict[nn.Module, Forward]:
        """The forward pass that stands in for each module's own."""
        return self._forwards

    def predictions(self, batch: Batch, points: Sequence[Point]) -> list[Predictions]:
        """The model's predictions at every point; the weights stay as they are."""
        if not self._surveyed:
            self._run(batch, [])
            self._surveyed = True
        uncalled = [module for module in self._held if module not in self._called]
        found = []
        for point in points:
            self._point = point
            found.append(self._run(batch, uncalled))
        return found

    def move(self, terms: Terms) -> None:
        """Move the weights by sum_k amount_k z_k."""
        for tensor in self._placed:
            if holds_walk(tensor.weight):
                assert isinstance(tensor.weight, Tensor)
                self._scope.move_(tensor.weight.data, terms, tensor.spec, self._probe)
        add_terms(self._walk, terms)

    def settle(self) -> None:
        """Nothing is pending: every step is taken at once."""

    def _run(self, batch: Batch, uncalled: Sequence[nn.Module]) -> Predictions:
        streams = self._head is not None or self._other_head is not None
        with ExitStack() as stack:
            for module in uncalled:
                stack.enter_context(self._swapped(module, self._held[module]))
            (found,) = predictions(self._model, batch, 1, self._head_logits if streams else None)
        return found

    def _stand_in(self, module: nn.Module, tensors: dict[str, Placed]) -> Forward:
        plain = type(module) in (nn.Linear, fk.QuantizedLinear)
        if plain and tensors.keys() <= {"weight", "bias"} and "weight" in tensors:
            stand_in = self._linear(module, tensors["weight"], tensors.get("bias"))
        elif is_conv1d(module) and "weight" in tensors:
            stand_in = self._conv1d(module, tensors["weight"], tensors.get("bias"))
        elif (type(module) is nn.Embedding and module.max_norm is None) or type(
            module
        ) is fk.QuantizedEmbedding:
            stand_in = self._embedding(module, tensors["weight"])
        else:
            stand_in = self._swapping(module, tensors)

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._called.add(module)
            return stand_in(*args, **kwargs)

        forward.stands_in = True  # type: ignore[attr-defined]
        return forward

    def _linear(self, module: Any, weight: Placed, bias: Placed | None) -> Forward:
        def forward(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            blocks = list(_blocks(weight))
            added = module.bias if bias is None else self._whole(bias)
            if len(blocks) == 1:
                y = functional.linear(rows, self._block(weight, *blocks[0], x.dtype), added)
            else:
                y = rows.new_empty(len(rows), weight.rows)
                for first, past in blocks:
                    part = self._block(weight, first, past, x.dtype)
                    torch.mm(rows, part.T, out=y[:, first:past])
                if added is not None:
                    y.add_(added)
            return y.view(*x.shape[:-1], -1)

        return forward

    def _conv1d(self, module: Any, weight: Placed, bias: Placed | None) -> Forward:
        def forward(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            added: Tensor = module.bias if bias is None else self._whole(bias)
            y = added.expand(len(rows), -1).clone()
            for first, past in _blocks(weight):
                y.addmm_(rows[:, first:past], self._block(weight, first, past, x.dtype))
            return y.view(*x.shape[:-1], -1)

        return forward

    def _embedding(self, module: Any, weight: Placed) -> Forward:
        own: Forward = module.forward

        def forward(ids: Tensor) -> Tensor:
            words, places = torch.unique(ids, return_inverse=True)
            rows: Tensor = own(words)
            terms = self._terms_beside(weight)
            if terms:
                part = fk.Part(weight.spec.shape, rows=words)
                rows = self._scope.move_(rows, terms, weight.spec, self._probe, part)
            return rows[places]

        return forward

    def _swapping(self, module: nn.Module, tensors: dict[str, Placed]) -> Forward:
        own: Forward = module.forward  # the fused one, where the model is accelerated

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._swapped(module, tensors):
                return own(*args, **kwargs)

        return forward

    @contextmanager
    def _swapped(self, module: nn.Module, tensors: dict[str, Placed]) -> Iterator[None]:
        before = {name: module._parameters.get(name) for name in tensors}
        try:
            for name, tensor in tensors.items():
                module._parameters[name] = self._whole(tensor)  # type: ignore[assignment]
            yield
        finally:
            module._parameters.update(before)

    def _terms_beside(self, tensor: Placed) -> dict[int, float]:
        """What the tensor as it lies in memory lacks of the point that is asked for."""
        terms = {} if holds_walk(tensor.weight) else dict(self._walk)
        add_terms(terms, dict([self._point]))
        terms = {seed: amount for seed, amount in terms.items() if amount != 0.0}
        return self._scope.of(tensor.spec, terms)

    def _block(self, tensor: Placed, first: int, past: int, dtype: torch.dtype) -> Tensor:
        """Rows [first, past) of the tensor at the point, valid until the next call."""
        weight, columns = tensor.weight, tensor.columns
        terms = self._terms_beside(tensor)
        # A quantised weight has its terms added in float32, and is rounded once, afterwards.
        own = weight.dtype if isinstance(weight, Tensor) else torch.float32
        source = rows_of(weight, first, past, own)
        if not terms:
            return source.to(dtype)
        part = fk.Part(tensor.spec.shape, offset=first * columns)
        out = self._room(source)
        if len(terms) == 1:
            ((seed, amount),) = terms.items()
            self._scope.perturbed(source, seed, amount, tensor.spec, self._probe, out, part)
        else:
            self._scope.move_(out.copy_(source), terms, tensor.spec, self._probe, part)
        return out.to(dtype)

    def _whole(self, tensor: Placed) -> Tensor:
        """The tensor at the point, in memory of its own."""
        weight = tensor.weight
        source = weight.detach() if isinstance(weight, Tensor) else weight.dequantize()
        terms = self._terms_beside(tensor)
        return self._scope.move_(source.clone(), terms, tensor.spec, self._probe)

    def _room(self, like: Tensor) -> Tensor:
        known = self._scratch.get(like.dtype)
        if known is None or known.numel() < like.numel():
            known = self._scratch[like.dtype] = torch.empty(like.numel(), dtype=like.dtype)
        return known[: like.numel()].view(like.shape)

    def _head_logits(self, rows: Tensor) -> Logits:
        if self._head is None:
            head: Any = self._other_head
            quantised = isinstance(head, fk.QuantizedLinear)
            own = head.quantized if quantised else head.weight
            return lambda first, past: rows @ rows_of(own, first, past, rows.dtype).T
        self._called.add(self._head)
        weight = self._held[self._head]["weight"]
        return lambda first, past: rows @ self._block(weight, first, past, rows.dtype).T


def _blocks(tensor: Placed) -> Iterator[tuple[int, int]]:
    rows = max(1, SCRATCH // tensor.columns)
    for first in range(0, tensor.rows, rows):
        yield first, min(first + rows, tensor.rows)
