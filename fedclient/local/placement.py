"""Where the tensors of a layout live in a model, also where some of them are quantised or tied."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import fedkernels as fk
from aggregators import Layout, TensorSpec


class PlacementError(ValueError):
    """A tensor of the layout that the model does not have."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A tensor of the layout in a model.

    ``holders``: (module, attribute) of every module that uses it: two for tied embeddings.
    ``weight``: the parameter, or what stands for it in a module of ``fedkernels``.
    """

    spec: TensorSpec
    holders: tuple[tuple[nn.Module, str], ...]
    weight: Tensor | fk.QuantizedTensor

    @property
    def rows(self) -> int:
        """Rows of the tensor as a matrix, as probes see it."""
        return self.spec.shape[0] if self.spec.shape else 1

    @property
    def columns(self) -> int:
        """Columns of the tensor as a matrix: all dimensions but the first."""
        columns = 1
        for size in self.spec.shape[1:]:
            columns *= size
        return columns


def place(model: nn.Module, layout: Layout, names: Collection[str] | None = None) -> list[Placed]:
    """The tensors of ``layout`` (those of ``names``; None: all) in ``model``, in the layout's order.

    Raises PlacementError for a tensor that the model does not have, or has with another shape.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, weight in _weights(module):
            holders.setdefault(_identity(weight), []).append((module, attribute))
    by_name: dict[str, Tensor | fk.QuantizedTensor] = {}
    for path, module in model.named_modules():
        for attribute, weight in _weights(module):
            by_name[f"{path}.{attribute}" if path else attribute] = weight
    found = []
    for spec in layout:
        if names is not None and spec.name not in names:
            continue
        if spec.name not in by_name:
            raise PlacementError(f"layer {spec.name!r} of the layout is not in this model")
        weight = by_name[spec.name]
        if tuple(weight.shape) != spec.shape:
            raise PlacementError(
                f"layer {spec.name!r} is {list(weight.shape)} here, {list(spec.shape)} in the layout"
            )
        found.append(Placed(spec, tuple(holders[_identity(weight)]), weight))
    return found


def _weights(module: nn.Module) -> list[tuple[str, Tensor | fk.QuantizedTensor]]:
    """What a module itself holds, quantised weights as "weight"."""
    found: list[tuple[str, Any]] = [
        (name, parameter) for name, parameter in module._parameters.items() if parameter is not None
    ]
    if isinstance(module, fk.QuantizedLinear):
        found.append(("weight", module.quantized))
    elif isinstance(module, fk.QuantizedEmbedding):
        shape = (module.num_embeddings, module.embedding_dim)
        codes = module.codes.flatten()
        found.append(("weight", fk.QuantizedTensor("int8", shape, shape[1], codes, module.scales)))
    return found


def _identity(weight: Tensor | fk.QuantizedTensor) -> int:
    """Equal for two modules that share one weight: a tied head may hold another object."""
    return weight.data_ptr() if isinstance(weight, Tensor) else weight.codes.data_ptr()
