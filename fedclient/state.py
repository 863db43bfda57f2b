"""The node's own weights: the base and the view of the global model, added in float32 at least.

To the weights' own type they are rounded once, whatever the round (``View.moved`` has the rest).
The base in memory is never written. A copy of it is kept for the last view alone, because all nodes of
a process see the same one in a round; a node that has its process for itself trains that copy.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from aggregators import Layout
from aggregators.view import View
from fedclient.base_model import LoadedModel, digest


@dataclass(frozen=True)
class Weights:
    """A model at some height of the run, frozen, and the digest of its weights. Not to be written."""

    model: nn.Module
    digest: str


_seen: set[str] = set()
_last: dict[tuple[str, str, str], Weights] = {}


def weights_of(base: LoadedModel, layout: Layout, view: View) -> Weights:
    """The weights that base and view are; made anew where the last ones were of another view."""
    if view.empty:
        return Weights(base.model, base.digest)
    dtype = next(base.model.parameters()).dtype
    key = (base.digest, str(dtype), view.digest())
    if key not in _last:
        _last.clear()
        model = rebuilt(base.model, layout, view)
        _last[key] = Weights(model, digest(model))
    return _last[key]


def is_alone(node: str) -> bool:
    """Whether this process has worked for no other node so far."""
    _seen.add(node)
    return _seen == {node}


def forget() -> None:
    """Keep no weights: they are made anew, and whoever holds the last ones may write to them."""
    _last.clear()


def rebuilt(model: nn.Module, layout: Layout, view: View) -> nn.Module:
    """A copy of the model with the view's change in its weights."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name in layout:
                parameter.copy_(view.moved(name, parameter))
    return moved
