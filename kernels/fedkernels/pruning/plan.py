"""A pruning plan: which heads and channels of each layer a node keeps, and how scores decide it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedkernels.pruning.masks import check_ratio, dropped
from fedkernels.pruning.structure import AXES, CHANNELS, HEADS, KV_HEADS, LayerShape
from fedkernels.reference.pruning import top_mask

SCOPES = ("layer", "global")
HEAD_UNITS = ("groups", "within")


@dataclass(frozen=True)
class Indices:
    """What is kept of one parameter; None: all of that axis.

    Attributes:
        shape: of the whole parameter; [out, in], or [out] of a bias.
        rows, columns: int64, sorted, without repetition.
    """

    shape: tuple[int, ...]
    rows: Tensor | None
    columns: Tensor | None

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Shape of what is kept."""
        axes = (self.rows, self.columns)[: len(self.shape)]
        kept = zip(self.shape, axes, strict=True)
        return tuple(size if axis is None else axis.numel() for size, axis in kept)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What one layer keeps: int64 indices, sorted, at least one of each part.

    Every kept key-value head serves equally many kept query heads, for the attention of Hugging
    Face's models repeats keys and values by one number; query heads of other groups are not kept.

    Raises:
        ValueError: the indices are not of that form.
    """

    shape: LayerShape
    heads: Tensor
    kv_heads: Tensor
    channels: Tensor

    def __post_init__(self) -> None:
        for part in (HEADS, KV_HEADS, CHANNELS):
            self._check(part)
        served = torch.bincount(self.heads // self.shape.group, minlength=self.shape.kv_heads)
        kept = torch.zeros_like(served)
        kept[self.kv_heads] = self.group
        if not torch.equal(served, kept):
            raise ValueError(
                f"heads of {self.shape.name}: {self.heads.tolist()} are not equally many of each"
                f" kept group of {self.shape.group}, the kept kv_heads being"
                f" {self.kv_heads.tolist()}"
            )

    @property
    def group(self) -> int:
        """Kept query heads per kept key-value head."""
        return self.heads.numel() // self.kv_heads.numel()

    def kept(self, part: str) -> Tensor:
        """Return the kept heads, kv_heads or channels."""
        return {HEADS: self.heads, KV_HEADS: self.kv_heads, CHANNELS: self.channels}[part]

    def axis(self, part: str) -> Tensor:
        """Return the rows or columns, int64 and sorted, that the kept heads or channels take."""
        width = self.shape.width(part)
        return (self.kept(part)[:, None] * width + torch.arange(width)).reshape(-1)

    def _check(self, part: str) -> None:
        kept, count = self.kept(part), self.shape.count(part)
        where = f"{part} of {self.shape.name}"
        if kept.dtype != torch.int64 or kept.dim() != 1 or kept.device.type != "cpu":
            raise ValueError(f"{where} must be a vector of int64 on the CPU")
        if kept.numel() == 0:
            raise ValueError(f"{where} must not be empty")
        if kept[0] < 0 or kept[-1] >= count or not (kept[1:] > kept[:-1]).all():
            raise ValueError(f"{where} must rise from 0 or more to less than {count}")


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """What a node keeps of each layer; layers that are not named are kept whole."""

    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        names = [layer.shape.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise ValueError("layers: one stands in the plan twice")

    def indices(self, parameter: str) -> Indices | None:
        """Return what is kept of a parameter, by its full name; None where all of it is.

        Weights: "model.layers.0.self_attn.q_proj.weight" and the like; biases of pruned rows too.
        """
        return self._indices.get(parameter)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters that are not kept whole, biases included that may not exist."""
        return tuple(self._indices)

    @property
    def kept_weights(self) -> float:
        """Fraction of the named layers' linear weights that is kept; 1 where none is named."""
        matrices = [found for found in self._indices.values() if len(found.shape) == 2]
        total = sum(found.shape[0] * found.shape[1] for found in matrices)
        kept = sum(found.kept_shape[0] * found.kept_shape[1] for found in matrices)
        return kept / total if total else 1.0

    @cached_property
    def _indices(self) -> dict[str, Indices]:
        found: dict[str, Indices] = {}
        for layer in self.layers:
            axes = {part: layer.axis(part) for part in (HEADS, KV_HEADS, CHANNELS)}
            for linear, (part, is_rows) in AXES.items():
                name, shape = f"{layer.shape.name}.{linear}", layer.shape.weight_shape(linear)
                if is_rows:
                    found[f"{name}.weight"] = Indices(shape, axes[part], None)
                    found[f"{name}.bias"] = Indices(shape[:1], axes[part], None)
                else:
                    found[f"{name}.weight"] = Indices(shape, None, axes[part])
        return found


def derive_plan(
    shapes: Sequence[LayerShape],
    scores: Mapping[str, Tensor],
    *,
    head_ratio: float,
    channel_ratio: float,
    scope: str = "layer",
    heads: str = "groups",
    minimum_heads: int = 1,
    minimum_channels: int = 1,
) -> PruningPlan:
    """Return the plan that drops the heads and channels whose weights' scores sum to the least.

    Args:
        shapes: as `layer_shapes` finds them.
        scores: by the weight's name: [out, in], or sums along the axis that is not pruned (rows of
            q, k, v, gate and up; columns of o and down). A linear without scores counts nothing;
            each layer needs some for its heads and some for its channels.
        head_ratio, channel_ratio: what to drop, in [0, 1); of n units, floor(ratio · n).
        scope: "layer": so many of every layer; "global": so many of all layers' together, the
            scores of different layers being compared as they are.
        heads: "groups": whole key-value heads with all their query heads; "within": of every group
            equally many query heads, where the scores of k and v play no part.
        minimum_heads, minimum_channels: what each layer keeps at least, of groups, of query heads
            per group, and of channels; fewer than the ratio are dropped where this demands it.

    Raises:
        ValueError: no shapes, an argument out of its range, or scores that are missing, not finite,
            of a wrong shape or of an unknown name.
    """
    if not shapes:
        raise ValueError("shapes must not be empty")
    check_ratio(head_ratio, "head_ratio")
    check_ratio(channel_ratio, "channel_ratio")
    for name, value, known in (("scope", scope, SCOPES), ("heads", heads, HEAD_UNITS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, and it is {value!r}")
    for name, least in (("minimum_heads", minimum_heads), ("minimum_channels", minimum_channels)):
        if least < 1:
            raise ValueError(f"{name} must be at least 1, and it is {least}")
    names = {f"{shape.name}.{linear}.weight" for shape in shapes for linear in AXES}
    if unknown := sorted(set(scores) - names):
        raise ValueError(f"scores: {unknown[0]!r} is no weight of these shapes")

    per_channel = [_unit_scores(shape, scores, CHANNELS) for shape in shapes]
    channels = _kept(per_channel, channel_ratio, minimum_channels, scope)
    if heads == "groups":
        per_group = [_group_scores(shape, scores) for shape in shapes]
        kept_groups = _kept(per_group, head_ratio, minimum_heads, scope)
        kv_heads = [mask.nonzero()[:, 0] for mask in kept_groups]
        queries = [_members(shape, kept) for shape, kept in zip(shapes, kv_heads, strict=True)]
    else:
        per_head = [
            _unit_scores(shape, scores, HEADS).reshape(shape.kv_heads, -1) for shape in shapes
        ]
        # the worst of every group go together, then the second worst: such slices are the units
        slices = [values.sort(dim=1, descending=True).values.sum(dim=0) for values in per_head]
        widths = [int(mask.sum()) for mask in _kept(slices, head_ratio, minimum_heads, scope)]
        kv_heads = [torch.arange(shape.kv_heads) for shape in shapes]
        queries = [
            top_mask(values, width).reshape(-1).nonzero()[:, 0]
            for values, width in zip(per_head, widths, strict=True)
        ]
    kept = zip(shapes, queries, kv_heads, channels, strict=True)
    return PruningPlan(tuple(LayerPlan(s, q, kv, mask.nonzero()[:, 0]) for s, q, kv, mask in kept))


def _group_scores(shape: LayerShape, scores: Mapping[str, Tensor]) -> Tensor:
    """Sum over each key-value head and its query heads, float64 [kv_heads]."""
    total = torch.zeros(shape.kv_heads, dtype=torch.float64)
    found = False
    for part in (HEADS, KV_HEADS):
        if _scored(shape, scores, part):
            found = True
            total += _unit_scores(shape, scores, part).reshape(shape.kv_heads, -1).sum(dim=1)
    if not found:
        raise ValueError(f"scores has nothing for the heads of {shape.name}")
    return total


def _members(shape: LayerShape, kv_heads: Tensor) -> Tensor:
    """Return the query heads of the given groups."""
    return (kv_heads[:, None] * shape.group + torch.arange(shape.group)).reshape(-1)


def _scored(shape: LayerShape, scores: Mapping[str, Tensor], part: str) -> list[tuple[str, bool]]:
    """Return the names of the weights with scores that consist of this part, and if by rows."""
    named = ((f"{shape.name}.{name}.weight", *of) for name, of in AXES.items())
    return [(name, is_rows) for name, of, is_rows in named if of == part and name in scores]


def _unit_scores(shape: LayerShape, scores: Mapping[str, Tensor], part: str) -> Tensor:
    """Sum the scores of each head or channel over all weights that it is part of, float64."""
    count, width = shape.count(part), shape.width(part)
    total = torch.zeros(count, dtype=torch.float64)
    scored = _scored(shape, scores, part)
    if not scored:
        raise ValueError(f"scores has nothing for the {part} of {shape.name}")
    for name, is_rows in scored:
        values = scores[name]
        if values.dim() == 2:
            values = values.sum(dim=1 if is_rows else 0, dtype=torch.float64)
        if values.shape != (count * width,):
            sizes = f"{list(scores[name].shape)} for {count * width} pruned rows or columns"
            raise ValueError(f"scores[{name!r}] is {sizes}")
        if not values.isfinite().all():
            raise ValueError(f"scores[{name!r}] has a NaN or an infinity")
        total += values.detach().to("cpu", torch.float64).reshape(count, width).sum(dim=1)
    return total


def _kept(scores: list[Tensor], ratio: float, minimum: int, scope: str) -> list[Tensor]:
    """Return for each layer's units which are kept; of equals the first."""
    if scope == "layer":
        return [_top(values, ratio, minimum) for values in scores]
    protected = [
        values.masked_fill(top_mask(values[None], min(minimum, len(values)))[0], torch.inf)
        for values in scores
    ]
    least = sum(int(values.isinf().sum()) for values in protected)
    masks = _top(torch.cat(protected), ratio, least)
    return list(torch.split(masks, [len(values) for values in scores]))


def _top(values: Tensor, ratio: float, minimum: int) -> Tensor:
    keep = max(len(values) - dropped(ratio, len(values)), min(minimum, len(values)))
    return top_mask(values[None], keep)[0]
