"""From the whole model to a node's smaller one, and from the smaller one's change back.

`gather` takes what a plan keeps, `scatter` puts it back where it was, with zeros elsewhere:

    gather(scatter(x)) = x
    scatter(gather(x)) = x where x is kept, 0 elsewhere
    dense(scatter_factors(f)) = scatter(dense(f)), for a low-rank change is rows of B, columns of A

so a pruned node's change is an ordinary change of the whole model, and sums with everybody's. The
same index sets restrict the probes, which are functions of an element's place in the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from fedkernels.pruning.plan import Indices, PruningPlan

# B [out, r], A [r, in], and the scale: a number or [r]
Factors = tuple[Tensor, Tensor, Any]

Module = TypeVar("Module", bound=nn.Module)


@overload
def gather(source: Mapping[str, Tensor], plan: PruningPlan) -> dict[str, Tensor]: ...
@overload
def gather(source: Module, plan: PruningPlan) -> Module: ...
def gather(
    source: nn.Module | Mapping[str, Tensor], plan: PruningPlan
) -> nn.Module | dict[str, Tensor]:
    """Return what the plan keeps: a smaller model, or smaller tensors.

    Args:
        source: a Hugging Face model with the layers of the plan, which stays as it is: the result
            is a copy, without the hooks of the linears that shrink. Or tensors by their parameters'
            names: weights, gradients, masks, probes; those that the plan does not name are passed
            on, not copied.
        plan: what to keep.

    Returns:
        A model computes what `source` would with all that is dropped set to zero. Where all layers
        keep equally much its configuration says so, and saving and loading work as ever (Llama's
        own check wants heads that divide the hidden size); else the sizes are the modules' alone,
        and a saved folder could not be loaded.

    Raises:
        ValueError: `source` has not the layers of the plan, or they are of another size; a module's
            forward pass was replaced, which a copy would share with the original.
    """
    if isinstance(source, nn.Module):
        from fedkernels.pruning.smaller_model import smaller_model

        return smaller_model(source, plan)
    return {name: _restricted(name, tensor, plan) for name, tensor in source.items()}


def scatter(tensors: Mapping[str, Tensor], plan: PruningPlan) -> dict[str, Tensor]:
    """Return tensors of the whole model's shapes with the smaller ones in place and zero elsewhere.

    Tensors that the plan does not name are passed on, not copied.

    Raises:
        ValueError: a tensor has not the shape that the plan leaves of it.
    """
    return {name: _spread(name, tensor, plan) for name, tensor in tensors.items()}


def gather_factors(factors: Mapping[str, Factors], plan: PruningPlan) -> dict[str, Factors]:
    """Return low-rank changes (B, A, scale) restricted to what is kept: B's rows, A's columns.

    Raises:
        ValueError: B has not the whole weight's rows, or A not its columns.
    """
    return _on_factors(factors, plan, _take, whole=True)


def scatter_factors(factors: Mapping[str, Factors], plan: PruningPlan) -> dict[str, Factors]:
    """Return a smaller model's low-rank changes (B, A, scale) as changes of the whole model.

    B gets rows of zeros and A columns of zeros where the plan dropped them; the rank stays.

    Raises:
        ValueError: B has not the kept rows, or A not the kept columns.
    """
    return _on_factors(factors, plan, _put, whole=False)


def _restricted(name: str, tensor: Tensor, plan: PruningPlan) -> Tensor:
    found = plan.indices(name)
    if found is None:
        return tensor
    _check_shape(name, tensor, found.shape)
    return _take(_take(tensor, 0, found.rows, 0), 1, found.columns, 0)


def _spread(name: str, tensor: Tensor, plan: PruningPlan) -> Tensor:
    found = plan.indices(name)
    if found is None:
        return tensor
    _check_shape(name, tensor, found.kept_shape)
    whole = _put(tensor, 0, found.rows, found.shape[0])
    return whole if len(found.shape) == 1 else _put(whole, 1, found.columns, found.shape[1])


def _on_factors(
    factors: Mapping[str, Factors],
    plan: PruningPlan,
    move: Callable[[Tensor, int, Tensor | None, int], Tensor],
    *,
    whole: bool,
) -> dict[str, Factors]:
    result: dict[str, Factors] = {}
    for name, (b, a, scale) in factors.items():
        found = plan.indices(name)
        if found is None:
            result[name] = b, a, scale
            continue
        out, columns = _matrix_shape(name, found, whole)
        if b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0]:
            shapes = f"{list(b.shape)} and {list(a.shape)}"
            raise ValueError(f"factors[{name!r}]: shapes {shapes} are not [out, r] and [r, in]")
        _check_shape(f"B of {name}", b, (out, b.shape[1]))
        _check_shape(f"A of {name}", a, (a.shape[0], columns))
        b = move(b, 0, found.rows, found.shape[0])
        a = move(a, 1, found.columns, found.shape[1])
        result[name] = b, a, scale
    return result


def _matrix_shape(name: str, found: Indices, whole: bool) -> tuple[int, int]:
    shape = found.shape if whole else found.kept_shape
    if len(shape) != 2:
        raise ValueError(f"factors[{name!r}]: a bias has no low-rank change")
    return shape[0], shape[1]


def _take(tensor: Tensor, axis: int, index: Tensor | None, size: int) -> Tensor:
    """Return the elements of `index` along an axis; `size` is not needed here, but in `_put`."""
    del size
    return tensor if index is None else tensor.index_select(axis, index.to(tensor.device))


def _put(tensor: Tensor, axis: int, index: Tensor | None, size: int) -> Tensor:
    """Return a tensor of `size` along an axis, zero outside `index`."""
    if index is None:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = size
    return tensor.new_zeros(shape).index_copy_(axis, index.to(tensor.device), tensor)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {list(shape)} for this plan, and is {list(tensor.shape)}")
