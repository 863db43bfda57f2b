"""What the modules of a Llama-like model look like, and their forward passes in fused functions.

Modules are known by their structure (the names and types of their parts), not by their classes, so
Llama, SmolLM2, Mistral, Qwen2 and Qwen3 are one case, and nothing here imports transformers or peft.
Each forward pass decides at every call whether it can serve it, and else calls the module's own: a
cache, unmerged variants of LoRA, dropout in training, hooks on a part and trained weights all stay with
the module, and a linear that peft wraps or unwraps later is found as it is at the time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedkernels.quantized_linear import QuantizedLinear
from fedkernels.training.adapted_linear import AdaptedLinear, Factor, adapted_linears
from fedkernels.training.attention import attention
from fedkernels.training.rows import rms_norm, swiglu

Forward = Callable[..., Any]
_ATTENTION_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3")


def kind_of(module: nn.Module) -> str | None:
    """Return "attention", "mlp", "norm" or "adapter" for a structure that is known, else None."""
    if _has_parts(module, ("q_proj", "k_proj", "v_proj", "o_proj")):
        return "attention" if _is_attention(module) else None
    if _has_parts(module, ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return "mlp" if _is_silu(module.act_fn) else None
    if "RMSNorm" in type(module).__name__ and _norm_epsilon(module) is not None:
        return "norm"
    if hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), nn.Linear):
        return "adapter"
    return None


def fused_forward(kind: str, module: Any, plain: Forward) -> Forward:
    """Return the forward pass of a module of this kind; `plain` is its own, for what stays with it.

    It is a partial, which copy and pickle follow: a copied module computes with its own weights.
    """
    return partial(_FORWARDS[kind], module, plain)


def linear_of(module: nn.Module) -> AdaptedLinear | None:
    """Return the frozen linear and active adapters that a module stands for; None if it is more."""
    if is_watched(module):
        return None
    if hasattr(module, "lora_A"):
        return _adapted(module)
    if isinstance(module, QuantizedLinear):
        return AdaptedLinear(module.quantized, module.bias)
    if type(module) is nn.Linear and not module.weight.requires_grad:
        return AdaptedLinear(module.weight, module.bias)
    return None


def _adapted(module: Any) -> AdaptedLinear | None:
    """A peft layer of plain LoRA, as its forward pass would treat it now."""
    base = linear_of(module.base_layer)
    if base is None or module.merged or module.disable_adapters:
        return None
    factors = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        a, b, dropout = (part[name] for part in (module.lora_A, module.lora_B, module.lora_dropout))
        drops = module.training and not isinstance(dropout, nn.Identity) and dropout.p > 0
        plain = type(a) is nn.Linear and type(b) is nn.Linear and a.bias is None and b.bias is None
        if drops or not plain or name in module.lora_variant or is_watched(a) or is_watched(b):
            return None
        factors.append(Factor(a.weight, b.weight, float(module.scaling[name])))
    return AdaptedLinear(base.weight, base.bias, tuple(factors))


def _linears(*modules: nn.Module) -> list[AdaptedLinear] | None:
    found = [linear_of(module) for module in modules]
    whole = [linear for linear in found if linear is not None]
    return whole if len(whole) == len(found) else None


def _joint(x: Tensor, *modules: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
    """What gives every module's y of rows like x: one function of frozen linears with adapters.

    A module whose forward pass on this instance is marked ``stands_in`` (whoever put it there says
    that it is a function of x alone) is called instead, and its siblings with it. None: neither.
    """
    if any(getattr(m.__dict__.get("forward"), "stands_in", False) for m in modules):
        return lambda rows: tuple(module(rows) for module in modules)
    linears = _linears(*modules)
    if linears is None or not _multiplies(linears[0], x):
        return None
    return lambda rows: adapted_linears(rows, linears)


def _multiplies(linear: AdaptedLinear, x: Tensor) -> bool:
    """Whether the types go together; a quantised weight takes either of the two it knows.

    Under autocast the plain module chooses the types.
    """
    if torch.is_autocast_enabled(x.device.type):
        return False
    if isinstance(linear.weight, Tensor):
        return linear.weight.dtype == x.dtype
    return x.dtype in (torch.float32, torch.bfloat16)


def _adapter_forward(module: Any, plain: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    linear = None if args or kwargs else linear_of(module)
    if linear is None or not _multiplies(linear, x):
        result: Tensor = plain(x, *args, **kwargs)
        return result
    return adapted_linears(x, [linear])[0]


def _norm_forward(module: Any, plain: Forward, x: Tensor) -> Tensor:
    epsilon = _epsilon(module)
    if epsilon is None or x.dtype != module.weight.dtype:
        result: Tensor = plain(x)
        return result
    return rms_norm(x, module.weight, epsilon)


def _mlp_forward(module: Any, plain: Forward, x: Tensor) -> Tensor:
    read, write = _joint(x, module.gate_proj, module.up_proj), _joint(x, module.down_proj)
    if read is None or write is None or is_watched(module.act_fn):
        result: Tensor = plain(x)
        return result
    gate, up = read(x)
    return write(swiglu(gate, up))[0]


def _attention_forward(
    module: Any,
    plain: Forward,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    read = _joint(hidden_states, module.q_proj, module.k_proj, module.v_proj)
    write = _joint(hidden_states, module.o_proj)
    mask = _mask_of(attention_mask, hidden_states)
    served = (
        read is not None
        and write is not None
        and past_key_values is None
        and not kwargs.get("output_attentions")
        and kwargs.get("is_causal") is None
        and (mask is not None or (attention_mask is None and module.is_causal))
        and module.config._attn_implementation in _ATTENTION_IMPLEMENTATIONS
        and not (module.training and module.attention_dropout > 0)
        and _are_tables(position_embeddings, hidden_states, module.head_dim)
    )
    if read is None or write is None or not served:
        return plain(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    q, k, v = (y.view(*y.shape[:-1], -1, module.head_dim) for y in read(hidden_states))
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    out = attention(q, k, v, position_embeddings, mask, module.scaling)
    return write(out.flatten(-2))[0], None


def _mask_of(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """A bool mask [batch or 1, 1, length, length] without its heads; None for any other."""
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4:
        return None
    length = hidden.shape[1]
    if mask.shape[1:] != (1, length, length) or mask.shape[0] not in (1, hidden.shape[0]):
        return None
    return mask[:, 0]


def _are_tables(tables: Any, hidden: Tensor, width: int) -> bool:
    batch, length, _ = hidden.shape
    return isinstance(tables, tuple) and all(
        t.ndim == 3 and t.shape[0] in (1, batch) and t.shape[1:] == (length, width) for t in tables
    )


def _has_parts(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(isinstance(module._modules.get(name), nn.Module) for name in names)


def _is_attention(module: Any) -> bool:
    """Whether attention has no parts but the known ones, and takes the arguments of today's models."""
    parts = {"q_proj", "k_proj", "v_proj", "o_proj"}
    normed = {"q_norm", "k_norm"}
    children = set(dict(module.named_children()))
    settings = ("head_dim", "scaling", "config", "is_causal", "attention_dropout")
    known = children in (parts, parts | normed) and all(hasattr(module, name) for name in settings)
    arguments = inspect.signature(module.forward).parameters
    wanted = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
    return known and all(name in arguments for name in wanted)


def _is_silu(module: Any) -> bool:
    return isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation"


def _norm_epsilon(module: Any) -> float | None:
    """The epsilon of a norm whose only tensor is one row of weights."""
    tensors = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    if tensors != ["weight"] or module.weight.ndim != 1:
        return None
    return _epsilon(module)


def _epsilon(module: Any) -> float | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon if isinstance(epsilon, float) else None


def is_watched(module: nn.Module) -> bool:
    """Whether hooks expect this module to be called: then nobody may go around it."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)


_FORWARDS: dict[str, Forward] = {
    "adapter": _adapter_forward,
    "attention": _attention_forward,
    "mlp": _mlp_forward,
    "norm": _norm_forward,
}
