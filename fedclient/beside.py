"""The view on a quantised base: nothing is folded into a weight that could not hold it.

A change along rank-1 probes stands beside its layer as a sign adapter, exactly; low-rank change as its
two factors. What the base holds in full (norms, biases) is replaced by its sum with the view, rounded
to its own type. All of it is put on the base's own modules for the duration of a ``with`` block, as
hooks, so the codes are in memory once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fedkernels as fk
from aggregators import Layout
from aggregators.view import View
from fedclient.base_model import LoadedModel
from fedclient.local.placement import Placed, place

RANK1 = "rank1"


class UnseenChangeError(ValueError):
    """Change that no adapter can hold exactly beside a quantised weight."""


@dataclass(frozen=True, eq=False)
class Beside:
    """The change of a matrix [out, in]: sign adapters, and factors B [out, k] and A [k, in]."""

    signs: tuple[fk.SignAdapter, ...]
    factors: tuple[Tensor, Tensor] | None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        """As a hook of the module that holds the matrix: its output with the change."""
        x: Tensor = inputs[0]
        if not x.is_floating_point():
            return y + self.rows(x.reshape(-1)).view(y.shape).to(y.dtype)
        x = x.contiguous()
        for adapter in self.signs:
            y = fk.sign_linear(x, adapter, y)
        if self.factors is not None:
            b, a = self.factors
            y = y + (x.float() @ a.T @ b.T).to(y.dtype)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """The change's rows ``ids`` int64 [n], as of an embedding: float32 [n, in]."""
        parts = [sign_rows(adapter, ids) for adapter in self.signs]
        if self.factors is not None:
            b, a = self.factors
            parts.append(b[ids] @ a)
        return torch.stack(parts).sum(0)

    def add_(self, x: Tensor, y: Tensor, first: int, past: int) -> None:
        """Add the product of x [n, in] with the change's rows [first, past) to y [n, past - first].

        ``first`` is a multiple of 32; both contiguous, of one type. Not differentiable.
        """
        for adapter in self.signs:
            cut(adapter, first, past).add_(x, y)
        if self.factors is not None:
            b, a = self.factors
            y += (x.float() @ a.T @ b[first:past].T).to(y.dtype)


@dataclass(frozen=True)
class Standing:
    """A view beside a quantised base, by tensor name; ``digest``: of the base, and of all this."""

    beside: dict[str, Beside]
    moved: dict[str, Tensor]
    digest: str


_last: dict[str, tuple[str, Standing]] = {}


def standing(base: LoadedModel, view: View) -> Standing:
    """What a view comes to beside a base; kept for the last view of each.

    Raises UnseenChangeError for change of a quantised weight that is neither low-rank nor along rank-1
    probes.
    """
    if view.empty:
        return Standing({}, {}, base.content)
    seen, key = view.digest(), f"{base.content} {next(base.model.parameters()).dtype}"
    if key not in _last or _last[key][0] != seen:
        _last[key] = (seen, _made(base, view))
    return _last[key][1]


@contextmanager
def standing_on(model: nn.Module, layout: Layout, made: Standing) -> Iterator[None]:
    """Put a view on the modules of a quantised base for as long as the block lasts.

    What the base holds in full may be written to in the block: it is a copy.
    """
    with ExitStack() as stack:
        for tensor in place(model, layout):
            name = tensor.spec.name
            if isinstance(tensor.weight, Tensor):
                own = made.moved.get(name, tensor.weight).detach().clone()
                parameter = nn.Parameter(own, requires_grad=False)
                for module, attribute in tensor.holders:
                    stack.callback(setattr, module, attribute, tensor.weight)
                    module._parameters[attribute] = parameter
            elif name in made.beside:
                for module, _ in tensor.holders:
                    stack.callback(module.register_forward_hook(made.beside[name]).remove)
        yield


def beside_of(module: nn.Module) -> Beside | None:
    """What stands beside a module's weight, for whoever computes with the weight itself."""
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, Beside)), None)


def cut(adapter: fk.SignAdapter, first: int, past: int) -> fk.SignAdapter:
    """The adapter of rows [first, past) of its matrix; ``first`` is a multiple of 32."""
    padded = -(-(past - first) // 32) * 32
    left = adapter.left[:, first : first + padded].contiguous()
    return fk.SignAdapter(
        left, adapter.right, adapter.coefficients, past - first, adapter.in_features
    )


def sign_rows(adapter: fk.SignAdapter, ids: Tensor) -> Tensor:
    """Rows ``ids`` of the adapter's change: float32 [ids, in]."""
    words = adapter.left[:, ids]
    bits = (words[:, None, :] >> torch.arange(32)[None, :, None]) & 1
    count = len(adapter.coefficients)
    u = 1.0 - 2.0 * bits.reshape(-1, len(ids))[:count]
    bits = (adapter.right[:, None, :count] >> torch.arange(32)[None, :, None]) & 1
    v = 1.0 - 2.0 * bits.reshape(-1, count)[: adapter.in_features].T
    return (u.T * adapter.coefficients) @ v


def _made(base: LoadedModel, view: View) -> Standing:
    factors = {
        name: ((b.double() * scale).float(), a)
        for name, (b, a, scale) in (view.factors() or {}).items()
    }
    beside: dict[str, Beside] = {}
    moved: dict[str, Tensor] = {}
    for tensor in place(base.model, base.layout):
        name = tensor.spec.name
        if isinstance(tensor.weight, Tensor):
            moved[name] = view.moved(name, tensor.weight).to(tensor.weight.dtype)
            continue
        if view.whole is not None and name in view.whole.tensors:
            raise UnseenChangeError(f"layer {name!r} is quantised, and its change is dense")
        one = Beside(_signs(view, tensor), factors.get(name))
        if one.signs or one.factors is not None:
            beside[name] = one
    return Standing(beside, moved, _digest(base.content, beside, moved))


def _signs(view: View, tensor: Placed) -> tuple[fk.SignAdapter, ...]:
    found = []
    for one in view.sums:
        seeds, totals = one.terms(tensor.spec.name)
        if not len(seeds):
            continue
        if one.probe != RANK1:
            raise UnseenChangeError(
                f"layer {tensor.spec.name!r} is quantised, and a sum of {one.probe!r} probes cannot"
                f" stand beside it; use the probe {RANK1!r}, or base_format = 'full'"
            )
        found.append(
            fk.SignAdapter.from_seeds(
                seeds.tolist(), totals.to(torch.int32), tensor.spec.tensor_id, tensor.spec.shape,
                one.exponent,
            )
        )  # fmt: skip
    return tuple(found)


def _digest(content: str, beside: dict[str, Beside], moved: dict[str, Tensor]) -> str:
    summed = hashlib.sha256(content.encode())
    parts: dict[str, tuple[Tensor, ...]] = {name: (tensor,) for name, tensor in moved.items()}
    for name, one in beside.items():
        words = [(s.left, s.right, s.coefficients) for s in one.signs]
        parts[name] = (*(t for three in words for t in three), *(one.factors or ()))
    for name in sorted(parts):
        summed.update(name.encode())
        for tensor in parts[name]:
            summed.update(f"|{list(tensor.shape)}|{tensor.dtype}|".encode())
            # NumPy has no bfloat16, so bytes are read as such, from a copy without odd strides.
            value = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            summed.update(value.view(-1).view(torch.uint8).numpy().data)
    return summed.hexdigest()
