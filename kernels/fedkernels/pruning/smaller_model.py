"""A copy of a Hugging Face model with really smaller linears."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from fedkernels.pruning.plan import LayerPlan, PruningPlan
from fedkernels.pruning.structure import AXES, layer_shapes

Module = TypeVar("Module", bound=nn.Module)


def smaller_model(model: Module, plan: PruningPlan) -> Module:
    """Return the model that the plan leaves of `model`; see `gather`, which calls this."""
    found = {shape.name: shape for shape in layer_shapes(model)}
    for layer in plan.layers:
        if found.get(layer.shape.name) != layer.shape:
            other = found.get(layer.shape.name, "no such layer")
            raise ValueError(f"plan is for {layer.shape}, and the model has {other}")
    for name, module in model.named_modules():
        if "forward" in vars(module):  # a copy would go on computing with the original's weights
            raise ValueError(
                f"model: {name or 'it'} has a forward pass of its own, as `accelerate` gives it;"
                " take that back first"
            )
    # What stands in deepcopy's memo is taken as copied: no dropped weight is ever duplicated.
    memo: dict[int, object] = {}
    for layer in plan.layers:
        for path in AXES:
            name = f"{layer.shape.name}.{path}"
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            memo[id(linear)] = _smaller_linear(linear, name, plan)
    smaller = copy.deepcopy(model, memo)
    for layer in plan.layers:
        _set_sizes(smaller.get_submodule(layer.shape.name), layer)
    if len(plan.layers) == len(found):
        _set_configuration(smaller, plan)
    return smaller


def _smaller_linear(linear: nn.Linear, name: str, plan: PruningPlan) -> nn.Linear:
    indices = plan.indices(f"{name}.weight")
    assert indices is not None
    out, columns = indices.kept_shape
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        result = nn.Linear(columns, out, bias=False)
    weight = linear.weight.detach()
    for axis, kept in enumerate((indices.rows, indices.columns)):
        if kept is not None:
            weight = weight.index_select(axis, kept.to(weight.device))
    result.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        kept = indices.rows
        bias = linear.bias.detach()
        bias = bias.clone() if kept is None else bias.index_select(0, kept.to(bias.device))
        result.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    return result.train(linear.training)


def _set_sizes(module: nn.Module, layer: LayerPlan) -> None:
    """Set the sizes that attention and feed-forward modules keep, where they do."""
    attention, feed_forward = module.self_attn, module.mlp
    heads, kv_heads = layer.heads.numel(), layer.kv_heads.numel()
    for owner, name, size in (
        (attention, "num_key_value_groups", layer.group),
        (attention, "num_heads", heads),
        (attention, "num_attention_heads", heads),
        (attention, "num_key_value_heads", kv_heads),
        (feed_forward, "intermediate_size", layer.channels.numel()),
    ):
        if isinstance(getattr(owner, name, None), int):
            setattr(owner, name, size)


def _set_configuration(model: nn.Module, plan: PruningPlan) -> None:
    """Write the sizes into the configuration where all layers have the same."""
    sizes = {
        (layer.heads.numel(), layer.kv_heads.numel(), layer.shape.head_dim, layer.channels.numel())
        for layer in plan.layers
    }
    configuration = getattr(model, "config", None)
    if configuration is None or len(sizes) != 1:
        return
    # head_dim by name, for else it is taken for hidden_size / num_attention_heads
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    for name, size in zip(names, sizes.pop(), strict=True):
        setattr(configuration, name, size)
