"""LoRAPrune's scores of a model while peft's adapter trains on it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedkernels.pruning.importance import lora_gradient
from fedkernels.pruning.structure import AXES


def adapter_scores(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Return `lora_gradient` sums for `derive_plan`, from the gradients of the latest backward pass.

    Call it after `backward`, before the optimiser clears the gradients, and average it over steps by
    `moving_average`; then take the adapter off, derive the plan and gather.

    Args:
        model: a model whose linears peft wrapped, or peft's wrapper of it. Linears without this
            adapter, and those that are no part of heads or channels, are left out.
        adapter: its name. Other adapters count neither as weights nor by their gradients.

    Returns:
        Sums along each linear's pruned axis, float64, by the names of the unwrapped model's weights.

    Raises:
        ValueError: no linear of heads or channels has this adapter, or its gradients are missing.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    base: nn.Module = model if unwrap is None else unwrap()
    found: dict[str, Tensor] = {}
    for name, module in base.named_modules():
        axis = AXES.get(".".join(name.split(".")[-2:]))
        if axis is None or adapter not in getattr(module, "lora_A", ()):
            continue
        layer: Any = module
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if a.grad is None or b.grad is None:
            raise ValueError(
                f"adapter {adapter!r} has no gradients at {name}: backward comes first"
            )
        found[f"{name}.weight"] = lora_gradient(
            layer.base_layer.weight.detach(), b.detach(), a.detach(), b.grad, a.grad,
            float(layer.scaling[adapter]), sums="rows" if axis[1] else "columns",
        )  # fmt: skip
    if not found:
        raise ValueError(f"adapter {adapter!r} is on no linear of heads or channels")
    return found
