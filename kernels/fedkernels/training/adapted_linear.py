"""Frozen linears that share an input, with their low-rank adapters, as one differentiable function.

    y_i = x W_iᵀ + bias_i + sum_j scale_ij (x A_ijᵀ) B_ijᵀ

with W dense or quantised.
The factors are fp32 masters and are used as such: x is read in its own dtype, the thin products run
in fp32, and no fp32 copy of x or y is ever made (peft makes one of x and two of y for every linear).
All A of the siblings (q, k and v; gate and up) are one matrix, so x is read once for all. Kept for
the gradient: x, and the thin x Aᵀ. dx is summed over the siblings inside their matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedkernels import quantized, quantized_product
from fedkernels.autograd import reshaped, without_autocast
from fedkernels.backends import threads
from fedkernels.quantized_tensor import QuantizedTensor
from fedkernels.reference import training as reference
from fedkernels.training.checks import check_alike, check_floating, check_shape, compiled_for


class Factor(NamedTuple):
    """One adapter of one linear: scale * B A, with A [rank, in] and B [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen weight [out, in], its bias, and the adapters on it."""

    weight: Tensor | QuantizedTensor
    bias: Tensor | None = None
    factors: tuple[Factor, ...] = ()


def adapted_linears(x: Tensor, linears: Sequence[AdaptedLinear]) -> tuple[Tensor, ...]:
    """Return one y [..., out_i] for each linear of the same x [..., in].

    Differentiable in x and in the factors. Compiled where x and the weights are fp32 or bf16 on the
    CPU, the factors fp32, and no weight needs a gradient.

    Raises:
        ValueError: `linears` is empty, or a weight, bias or factor does not fit.
    """
    check_floating("x", x)
    if not linears:
        raise ValueError("linears is empty: there is nothing to compute")
    for linear in linears:
        _check(linear, x)
    frozen = [
        t for linear in linears for t in (linear.weight, linear.bias) if isinstance(t, Tensor)
    ]
    factors = [factor for linear in linears for factor in linear.factors]
    thin = all(t.dtype == torch.float32 for factor in factors for t in (factor.a, factor.b))
    isa = compiled_for(x, *frozen)
    if isa is None or not thin or any(t.requires_grad for t in frozen):
        return tuple(_plain(x, linear) for linear in linears)
    flat = [t for factor in factors for t in (factor.a, factor.b)]
    return tuple(_AdaptedLinears.apply(x, tuple(linears), isa, *flat))  # type: ignore[no-untyped-call]


def _plain(x: Tensor, linear: AdaptedLinear) -> Tensor:
    weight = linear.weight
    if isinstance(weight, Tensor):
        return reference.adapted_linear(x, weight, linear.bias, linear.factors)
    y = quantized.linear(x, weight, linear.bias)
    return reference.add_factors(y, x, linear.factors)


def _check(linear: AdaptedLinear, x: Tensor) -> None:
    rows, columns = linear.weight.shape
    if isinstance(linear.weight, Tensor):
        check_floating("weight", linear.weight, 2)
        check_alike("weight", linear.weight, "x", x)
    if columns != x.shape[-1]:
        raise ValueError(f"weight has {columns} columns, and x the width {x.shape[-1]}")
    if linear.bias is not None:
        check_shape("bias", linear.bias, (rows,))
    for a, b, _ in linear.factors:
        check_floating("A", a, 2)
        check_shape("A", a, (a.shape[0], columns))
        check_shape("B", b, (rows, a.shape[0]))


class _Place(NamedTuple):
    """Where a factor's ranks stand among the columns of x Aᵀ."""

    linear: int
    first: int
    rank: int
    scale: float


def _places(linears: Sequence[AdaptedLinear]) -> Iterator[_Place]:
    first = 0
    for index, linear in enumerate(linears):
        for factor in linear.factors:
            rank = factor.a.shape[0]
            yield _Place(index, first, rank, factor.scale)
            first += rank


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: Tensor, linears: tuple[AdaptedLinear, ...], isa: int, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        from fedkernels import _cpu

        x = x.detach().contiguous()
        rows = x.view(-1, x.shape[-1])
        places = list(_places(linears))
        h, across = _projected(rows, flat, places, len(linears), isa)
        ys = []
        for index, linear in enumerate(linears):
            y = _product(rows, linear.weight, linear.bias)
            mine = [place for place in places if place.linear == index]
            if mine:
                _cpu.low_rank_expand_(y, h, mine[0].first, across[index], isa, threads())
            ys.append(reshaped(y, (*x.shape[:-1], y.shape[1])))
        ctx.save_for_backward(x, h, *flat)
        # Weights are frozen; keeping the module's own tensors costs nothing.
        ctx.weights = [linear.weight for linear in linears]
        ctx.places, ctx.isa = places, isa
        return tuple(ys)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        from fedkernels import _cpu

        x, h, *flat = ctx.saved_tensors
        places: list[_Place] = ctx.places
        rows = x.view(-1, x.shape[-1])
        gradients = [dy.contiguous().view(len(rows), -1) for dy in dys]
        dx = _through_weights(gradients, ctx.weights) if ctx.needs_input_grad[0] else None
        wanted: list[bool] = list(ctx.needs_input_grad[3:])
        dflat: list[Tensor | None] = [None] * len(flat)
        if places and (dx is not None or any(wanted)):
            g = _pulled_back(gradients, flat, places, ctx.isa)
            if dx is not None:
                _cpu.low_rank_expand_(dx, g, 0, _stacked_a(flat), ctx.isa, threads())
            _a_gradients(dflat, wanted, g, rows, places, ctx.isa)
            for i, place in enumerate(places):
                if wanted[2 * i + 1]:
                    dy = gradients[place.linear]
                    db = torch.empty(place.rank, dy.shape[1], dtype=torch.float32)
                    _cpu.low_rank_outer(db, h, place.first, dy, ctx.isa, threads())
                    dflat[2 * i + 1] = db.mul_(place.scale).T.contiguous()
        return dx.view_as(x) if dx is not None else None, None, None, *dflat


def _projected(
    rows: Tensor, flat: Sequence[Tensor], places: Sequence[_Place], count: int, isa: int
) -> tuple[Tensor, list[Tensor]]:
    """x Aᵀ for all A [rows, total rank], and for each linear its scale * Bᵀ [its rank, out]."""
    from fedkernels import _cpu

    across: list[Tensor] = []
    if not places:
        return rows.new_empty(0), across
    a = _stacked_a(flat)
    h = torch.empty(len(rows), len(a), dtype=torch.float32)
    _cpu.low_rank_project(h, rows, a.T.contiguous(), isa, threads())
    for index in range(count):
        mine = [(i, place) for i, place in enumerate(places) if place.linear == index]
        parts = [flat[2 * i + 1].detach().T * place.scale for i, place in mine]
        across.append(torch.cat(parts).contiguous() if parts else rows.new_empty(0))
    return h, across


def _stacked_a(flat: Sequence[Tensor]) -> Tensor:
    return torch.cat([a.detach() for a in flat[::2]])


def _product(rows: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        return quantized_product.linear(rows, weight, bias)
    return functional.linear(rows, weight, bias)


def _through_weights(
    gradients: Sequence[Tensor], weights: Sequence[Tensor | QuantizedTensor]
) -> Tensor:
    """The sum of dy_i W_i; where W_i is dense it is added inside its product."""
    dx: Tensor | None = None
    for dy, weight in zip(gradients, weights, strict=True):
        if dx is not None and isinstance(weight, Tensor):
            dx.addmm_(dy, weight)
            continue
        if isinstance(weight, Tensor):
            part = dy @ weight
        else:
            part = quantized_product.linear_backward(dy, weight)
        dx = part if dx is None else dx.add_(part)
    assert dx is not None
    return dx


def _pulled_back(
    gradients: Sequence[Tensor], flat: Sequence[Tensor], places: Sequence[_Place], isa: int
) -> Tensor:
    """scale dy B for every factor, side by side as x Aᵀ is: [rows, total rank]."""
    from fedkernels import _cpu

    parts = []
    for i, place in enumerate(places):
        part = torch.empty(len(gradients[0]), place.rank, dtype=torch.float32)
        b = flat[2 * i + 1].detach() * place.scale
        _cpu.low_rank_project(part, gradients[place.linear], b, isa, threads())
        parts.append(part)
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _a_gradients(
    dflat: list[Tensor | None],
    wanted: Sequence[bool],
    g: Tensor,
    rows: Tensor,
    places: Sequence[_Place],
    isa: int,
) -> None:
    """dA = gᵀ x: one product for each run of neighbours that are trained, so x is read once."""
    from fedkernels import _cpu

    start = 0
    while start < len(places):
        end = start
        while end < len(places) and wanted[2 * end]:
            end += 1
        if end > start:
            ranks = [place.rank for place in places[start:end]]
            da = torch.empty(sum(ranks), rows.shape[1], dtype=torch.float32)
            _cpu.low_rank_outer(da, g, places[start].first, rows, isa, threads())
            for i, part in zip(range(start, end), torch.split(da, ranks), strict=True):
                dflat[2 * i] = part
        start = end + 1
