"""Which tensors a node trains in a round, where memory or time do not allow for all.

    owlore           layers, more often those whose weights have outliers (OwLore, Li et al., 2024)
    hft              half of every group of like tensors (HFT, Hui et al., 2024)
    green_trainer    the largest gain under a budget of backward operations (Huang et al., 2024)

Each returns names in the layout's order; the rest needs no gradient and no optimiser state. Draws are
functions of their seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import fedkernels as fk
from aggregators import Layout
from aggregators.targets import layer_of
from fedclient.loss import answer_loss

# A score this many times the mean of its matrix is an outlier (OWL, Yin et al., 2024).
OUTLIER = 5.0
# Costs are whole numbers of this part of the budget, so that a table finds the best choice.
BUDGET_STEPS = 20_000


def owlore(
    layout: Layout,
    names: Sequence[str],
    seed: int,
    share: float,
    outliers: Mapping[str, float],
) -> list[str]:
    """A ``share`` of the layers (at least one), drawn without replacement by their outliers.

    ``outliers``: matrix name -> share of outliers, of ``outlier_shares``; a layer's is their mean.
    Tensors outside of the layers (embeddings, last norm, head) are always trained, as in LISA (Pan et
    al., 2024), on which OwLore stands.
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    always = layers.pop("", [])
    weights = {}
    for layer, members in layers.items():
        found = [outliers[name] for name in members if name in outliers]
        weights[layer] = math.fsum(found) / len(found) if found else 0.0
    chosen = {*always}
    chance = random.Random(seed)
    for _ in range(max(1, round(share * len(layers))) if layers else 0):
        left = sorted(weights)
        mass = [weights[layer] for layer in left]
        if sum(mass) <= 0:
            mass = [1.0] * len(left)
        layer = chance.choices(left, mass)[0]
        chosen.update(layers[layer])
        del weights[layer]
    return _in_order(layout, chosen)


def hft(layout: Layout, names: Sequence[str], seed: int) -> list[str]:
    """Half of each group: a layer's attention matrices, its other matrices, its vectors, the rest.

    Of groups of an odd size every second gets one more, so that the whole is halved as well.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        layer = layer_of(name)
        block = name.removeprefix(layer).split(".")[0] if layer else ""
        kind = block if len(layout.shape(name)) > 1 else "vectors"
        groups.setdefault((layer, kind), []).append(name)
    chance = random.Random(seed)
    more = chance.random() < 0.5
    chosen: set[str] = set()
    for _, members in sorted(groups.items()):
        count = len(members) // 2
        if len(members) % 2:
            count += more
            more = not more
        chosen.update(chance.sample(sorted(members), count))
    return _in_order(layout, chosen)


def green_trainer(
    layout: Layout, names: Sequence[str], gains: Mapping[str, float], share: float
) -> list[str]:
    """The tensors of the largest summed gain whose backward pass costs at most ``share`` of the whole.

    ``gains``: name -> expected decrease of the loss, such as the squared norm of its gradient; the
    layout's order is taken for that of the forward pass. A tensor's own gradient costs its elements,
    and so does each matrix through which the pass has to go to reach it: all those after it, and a
    tied head. Attention's own products are not counted. The choice is the best one up to rounding
    each cost up to 1/20,000 of the budget. Where not even the last tensor fits, it alone is trained.
    """
    chosen = sorted(names, key=layout.tensor_id, reverse=True)
    if share >= 1:
        return chosen[::-1]
    sizes = {spec.name: math.prod(spec.shape) for spec in layout}
    pass_on = {spec.name: sizes[spec.name] if len(spec.shape) > 1 else 0 for spec in layout}
    head = _tied_head(layout)
    fixed = sizes[head] if head is not None else 0
    # What the pass costs that reaches each tensor, from the output backwards.
    reach, passed = {}, fixed
    for spec in reversed(layout.tensors):
        reach[spec.name] = passed
        passed += pass_on[spec.name]
    deepest = max((reach[name] for name in chosen), default=0)
    budget = share * (deepest + sum(sizes[name] for name in chosen))
    step = budget / BUDGET_STEPS
    best = torch.zeros(BUDGET_STEPS + 1, dtype=torch.float64)
    taken: list[Tensor] = []
    top, last, left = -1.0, -1, 0
    for position, name in enumerate(chosen):
        cost = math.ceil(sizes[name] / step)
        with_it = torch.full_like(best, -1.0)
        if cost <= BUDGET_STEPS:
            with_it[cost:] = best[: BUDGET_STEPS + 1 - cost] + gains.get(name, 0.0)
        taken.append(with_it >= best)
        best = torch.maximum(best, with_it)
        room = math.floor((budget - reach[name]) / step)
        # Only a choice that has this tensor needs the pass to come so far.
        if room >= 0 and bool(taken[-1][room]) and float(best[room]) > top:
            top, last, left = float(best[room]), position, room
    found = []
    for position in range(last, -1, -1):
        if bool(taken[position][left]):
            found.append(chosen[position])
            left -= math.ceil(sizes[chosen[position]] / step)
    return _in_order(layout, found or chosen[:1])


@torch.no_grad()
def outlier_shares(model: nn.Module, layout: Layout, batch: dict[str, Tensor]) -> dict[str, float]:
    """For each matrix of a layer, how many of its scores |w_ij| ||x_j|| exceed 5 times their mean.

    ||x_j|| is of ``batch``, by one forward pass; 1 where the matrix is not an ``nn.Linear``.
    """
    parameters = dict(model.named_parameters())
    norms = None
    if any(isinstance(module, nn.Linear) for module in model.modules()):
        with fk.pruning.InputNorms(model) as norms:
            answer_loss(model, batch)
    found = {}
    for spec in layout:
        if len(spec.shape) != 2 or not layer_of(spec.name):
            continue
        weight, path = parameters[spec.name], spec.name.rpartition(".")[0]
        if norms is not None and path in norms:
            scores = fk.pruning.wanda(weight, norms[path])
        else:
            scores = fk.pruning.magnitude(weight)
        found[spec.name] = float((scores > OUTLIER * scores.mean()).double().mean())
    return found


def _tied_head(layout: Layout) -> str | None:
    """The embedding, where it is also the head: the layout has no matrix after its layers."""
    matrices = [spec.name for spec in layout if len(spec.shape) == 2]
    if not matrices or layer_of(matrices[0]) or not layer_of(matrices[-1]):
        return None
    return matrices[0]


def _in_order(layout: Layout, names: Sequence[str] | set[str]) -> list[str]:
    return sorted(names, key=layout.tensor_id)
