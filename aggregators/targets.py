"""Which tensors of a layout a method trains: by module names, and by a range of layers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aggregators.layout import Layout

ALL_LINEAR = "all-linear"
EMBEDDINGS = ("embed", "wte", "wpe")
NOT_LINEAR = (*EMBEDDINGS, "lm_head")
_LAYER = re.compile(r"^(?:.*?\.)?(\d+)\.")

# Layers [first, past), counted from 0; None: all, and what stands outside of the layers.
Layers = tuple[int, int] | None


def match_targets(
    layout: Layout, target_modules: Sequence[str], layers: Layers = None
) -> list[str]:
    """The weights that a list of module names means, in the layout's order.

    A name matches a module's last component or a dotted suffix of its path, as in peft.
    "all-linear" means every matrix but embeddings and the head.
    """
    found = []
    for spec in layout.tensors:
        path, _, leaf = spec.name.rpartition(".")
        if leaf != "weight" or len(spec.shape) != 2 or not _within(spec.name, layers):
            continue
        linear = not any(word in path for word in NOT_LINEAR)
        for target in target_modules:
            if (target == ALL_LINEAR and linear) or f".{path}".endswith(f".{target}"):
                found.append(spec.name)
                break
    return found


def trained_names(
    layout: Layout, target_modules: Sequence[str], layers: Layers = None
) -> list[str]:
    """The tensors of full-weight training: those that match, of any shape where () means all."""
    if target_modules:
        return match_targets(layout, target_modules, layers)
    return [spec.name for spec in layout if _within(spec.name, layers)]


def is_embedding(name: str) -> bool:
    """Whether rows of a weight are looked up, so that no factors can stand beside a product with it."""
    return any(word in name for word in EMBEDDINGS)


def layer_of(name: str) -> str:
    """The path of the layer that a tensor belongs to, with its dot: up to the first number. Or ""."""
    match = _LAYER.match(name)
    return match.group() if match else ""


def layer_count(layout: Layout) -> int:
    """How many layers the model has."""
    numbers = [_number(spec.name) for spec in layout]
    return max((number + 1 for number in numbers if number is not None), default=0)


def _within(name: str, layers: Layers) -> bool:
    if layers is None:
        return True
    number = _number(name)
    return number is not None and layers[0] <= number < layers[1]


def _number(name: str) -> int | None:
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None
