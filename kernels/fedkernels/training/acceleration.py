"""One call that makes a model's training step fast, module by module, and one that undoes it.

A module is replaced where its structure is known (`modules.py`) and, on a small random input, its
fused forward pass answers as its own does. The first tells what to try, the second that a model which
looks like Llama and computes something else (a norm with 1 + weight, say) keeps its own code. One
trial speaks for a class, but for attention, of which some models rotate in some of their layers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedkernels.training.modules import Forward, fused_forward, is_watched, kind_of

# Relative distance of two answers that are the same function, rounded differently.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_POSITIONS = 8
_NAMES = {"adapter": "LoRA linear", "attention": "attention", "mlp": "MLP", "norm": "RMSNorm"}


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did: numbers of modules by kind, and by class where they were left alone."""

    accelerated: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        done = ", ".join(f"{number} {_NAMES[kind]}" for kind, number in self.accelerated.items())
        rest = ", ".join(f"{number} {name}" for name, number in self.left.items())
        return f"accelerated: {done or 'nothing'}; left alone: {rest or 'nothing'}"


def accelerate(model: nn.Module) -> Acceleration:
    """Give the known modules of `model` fused forward passes, in place; call it after peft's wrapping.

    Instances are changed, not classes, and `restore` takes everything back. Values and gradients stay
    the plain model's within rounding. Calling it again changes nothing that is accelerated already.
    Weights of the base are taken as frozen; where one needs a gradient its module runs as before.
    """
    accelerated: Counter[str] = Counter()
    left: Counter[str] = Counter()
    proven: dict[tuple[Any, ...], bool] = {}
    for module in model.modules():
        kind = kind_of(module)
        if kind is None:
            continue
        known = module.__dict__.get("forward")
        if known is not None:
            # Another library's forward pass on this instance is not ours to go around.
            ours = getattr(known, "fused", False)
            (accelerated if ours else left)[kind if ours else type(module).__name__] += 1
            continue
        plain: Forward = module.forward
        fused = fused_forward(kind, module, plain)
        dtype = next(t.dtype for t in _tensors(module) if t.is_floating_point())
        # Attention may differ from layer to layer of one class: SmolLM3 rotates in some only.
        key = (kind, type(module), dtype, module if kind == "attention" else None)
        # The trial would set off the hooks on its parts.
        watched = any(is_watched(part) for part in module.modules())
        if not watched and key not in proven:
            proven[key] = _agree(kind, module, plain, fused)
        if not watched and proven[key]:
            fused.fused = True  # type: ignore[attr-defined]
            module.__dict__["forward"] = fused
            accelerated[kind] += 1
        else:
            left[type(module).__name__] += 1
    left.update(_outside(model))
    return Acceleration(dict(sorted(accelerated.items())), dict(sorted(left.items())))


def restore(model: nn.Module) -> None:
    """Take back what `accelerate` did to `model` and everything in it."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "fused", False):
            del module.__dict__["forward"]


@contextmanager
def accelerated(model: nn.Module) -> Iterator[Acceleration]:
    """`accelerate` for the duration of a with block."""
    try:
        yield accelerate(model)
    finally:
        restore(model)


def _outside(model: nn.Module) -> Counter[str]:
    """Linears and norms of no known kind that no accelerated module contains, by class."""
    names: Counter[str] = Counter()

    def visit(module: nn.Module) -> None:
        if getattr(module.__dict__.get("forward"), "fused", False):
            return
        kind = type(module).__name__
        plain = "Norm" in kind or "Linear" in kind or kind == "Conv1D"
        if plain and kind_of(module) is None and not list(module.children()):
            names[kind] += 1
        for child in module.children():
            visit(child)

    visit(model)
    return names


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _agree(kind: str, module: Any, plain: Forward, fused: Forward) -> bool:
    """Whether both passes answer alike; dropout is off, and no random state is touched.

    One that cannot answer at all (its rotary positions have another width, say) is not the same.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            probe = _probe(kind, module)
            if probe is None:
                return False
            x, others = probe
            theirs = plain(x, **others)
            mine = fused(x, **others)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False  # another shape of things: norms of all heads at once, partial rotation
    finally:
        for part, mode in modes.items():
            part.training = mode
    if isinstance(theirs, tuple):
        mine, theirs = mine[0], theirs[0]
    distance = float((mine.double() - theirs.double()).norm())
    return distance <= _TOLERANCES.get(theirs.dtype, 0.0) * float(theirs.double().norm())


def _probe(kind: str, module: Any) -> tuple[Tensor, dict[str, Any]] | None:
    """A small random input and, for attention, the arguments beside it: random angles, no mask."""
    reader = {
        "adapter": lambda: module.base_layer,
        "attention": lambda: module.q_proj,
        "mlp": lambda: module.gate_proj,
        "norm": lambda: module,
    }[kind]()
    width = reader.weight.shape[0] if kind == "norm" else reader.in_features
    weight = next(t for t in _tensors(reader) if t.is_floating_point())
    if weight.dtype not in _TOLERANCES:
        return None
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, _POSITIONS, width, generator=random).to(weight)
    if kind != "attention":
        return x, {}
    angles = 3 * torch.rand(1, _POSITIONS, module.head_dim // 2, generator=random).repeat(1, 1, 2)
    tables = (angles.cos().to(weight), angles.sin().to(weight))
    return _telling(module, x), {"position_embeddings": tables, "attention_mask": None}


def _telling(module: Any, x: Tensor) -> Tensor:
    """x, scaled so that scores are near one: softmax neither hides what precedes it nor magnifies it."""
    q, k = (part(x).float() for part in (module.q_proj, module.k_proj))
    score = float(q.std() * k.std()) * module.head_dim**0.5 * module.scaling
    return x * score**-0.5 if score > 0 else x
