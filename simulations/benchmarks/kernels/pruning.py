"""Pruning: scores, masks and gathering against plain torch, and what smaller layers are worth.

The forward pass is that of the embedded model if it is in the cache, else of random weights of the
same sizes: its time does not depend on their values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedkernels import pruning
from fedkernels.pruning import LayerPlan, LayerShape, PruningPlan
from fedkernels.reference import pruning as reference
from simulations.benchmarks.kernels.row import Row
from simulations.benchmarks.kernels.timing import least_seconds

RANK = 16


def rows(quick: bool) -> list[Row]:
    """Measure on one square weight, 2048² or 1024² if quick, and on a model of 135M parameters."""
    size, repeats = (1024, 3) if quick else (2048, 7)
    return [
        *_scores(size, repeats),
        *_masks(size, repeats),
        *_gather(size, repeats),
        *_forward(quick),
    ]


def _scores(size: int, repeats: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    w, gradient = torch.randn(2, size, size, generator=generator)
    b, db = torch.randn(2, size, RANK, generator=generator)
    a, da = torch.randn(2, RANK, size, generator=generator)
    norms = torch.rand(size, generator=generator)
    lora = w, b, a, db, da
    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]] = {
        "magnitude": (
            lambda: pruning.magnitude(w, "rows"), lambda: reference.magnitude(w).sum(1), [w],
        ),
        "wanda": (
            lambda: pruning.wanda(w, norms, "rows"), lambda: reference.wanda(w, norms).sum(1), [w],
        ),
        "taylor": (
            lambda: pruning.taylor(w, gradient, "rows"),
            lambda: reference.taylor(w, gradient).sum(1), [w, gradient],
        ),
        f"lora_gradient, r {RANK}": (
            lambda: pruning.lora_gradient(*lora, sums="rows"),
            lambda: reference.lora_gradient(*lora, 1.0).sum(1), [w],
        ),
    }  # fmt: skip
    found = []
    for name, (fast, plain, read) in cases.items():
        seconds, reference_seconds = least_seconds(fast, plain, repeats=repeats)
        found.append(
            Row(
                family="pruning",
                name=f"{name}, sums of rows, {size}²",
                seconds=seconds,
                reference_seconds=reference_seconds,
                reference="whole score matrix in torch",
                floor_seconds=sum(least_seconds(*(part.sum for part in read))),
                floor="read once (sum)",
                target="≥ 1 ×",
            )
        )
    return found


def _masks(size: int, repeats: int) -> list[Row]:
    scores = torch.rand(size, size, generator=torch.Generator().manual_seed(0))
    [floor] = least_seconds(lambda: scores > 0.5)
    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], str]] = {
        "2:4 mask": (
            lambda: pruning.two_of_four_mask(scores), lambda: _two_of_four_by_topk(scores),
            "topk of groups",
        ),
        "50 % mask, per row": (
            lambda: pruning.unstructured_mask(scores, 0.5),
            lambda: reference.top_mask(scores, size // 2), "stable sort of rows",
        ),
        "50 % mask, per matrix": (
            lambda: pruning.unstructured_mask(scores, 0.5, "matrix"),
            lambda: reference.top_mask(scores.reshape(1, -1), size**2 // 2), "stable sort",
        ),
    }  # fmt: skip
    found = []
    for name, (fast, plain, kind) in cases.items():
        seconds, reference_seconds = least_seconds(fast, plain, repeats=repeats)
        found.append(
            Row(
                family="pruning", name=f"{name}, {size}²", seconds=seconds,
                reference_seconds=reference_seconds, reference=f"{kind} in torch",
                floor_seconds=floor, floor="one comparison", target="≥ 2 ×",
            )
        )  # fmt: skip
    return found


def _two_of_four_by_topk(scores: Tensor) -> Tensor:
    groups = scores.reshape(-1, 4)
    kept = groups.topk(2, dim=1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True).reshape(scores.shape)


def _gather(size: int, repeats: int) -> list[Row]:
    """Three of four heads and channels of one layer whose feed-forward part is square."""
    shape = LayerShape("layer", size, size // 64, size // 64, 64, size)
    plan = PruningPlan((_every_fourth_dropped(shape),))
    up, down = "layer.mlp.up_proj.weight", "layer.mlp.down_proj.weight"
    weights = {name: torch.randn(size, size) for name in (up, down)}
    mask = torch.ones(size, dtype=torch.bool)
    mask[3::4] = False

    def naive() -> object:
        return weights[up][mask].contiguous(), weights[down][:, mask].contiguous()

    small = pruning.gather(weights, plan)
    seconds, reference_seconds, back = least_seconds(
        lambda: pruning.gather(weights, plan),
        naive,
        lambda: pruning.scatter(small, plan),
        repeats=repeats,
    )
    [floor] = least_seconds(lambda: [part.clone() for part in small.values()])
    return [
        Row(
            family="pruning",
            name=f"gather 3/4 of the rows and of the columns of two {size}²",
            seconds=seconds,
            reference_seconds=reference_seconds,
            reference="boolean indexing in torch",
            floor_seconds=floor,
            floor="copy of the result",
            target="≥ 1 ×",
            extra={"scatter back, ms": back * 1e3},
        )
    ]


def _forward(quick: bool) -> list[Row]:
    model = _model()
    tokens = torch.arange(64 if quick else 256)[None]
    shapes = pruning.layer_shapes(model)
    scores = pruning.layer_scores(
        model, lambda name, linear, sums: pruning.magnitude(linear.weight, sums)
    )
    found = []
    for share in (0.25, 0.5):
        plan = pruning.derive_plan(
            shapes, scores, head_ratio=max(share, 1 / 3), channel_ratio=share
        )
        small = pruning.gather(model, plan)
        with torch.inference_mode():
            seconds, reference_seconds = least_seconds(
                partial(small.model, tokens),
                partial(model.model, tokens),
                repeats=3 if quick else 5,
            )
        kept = plan.kept_weights
        found.append(
            Row(
                family="pruning",
                name=f"forward of SmolLM2-135M's layers, {share:.0%} of the channels and 1 of 3"
                f" groups of heads dropped, {tokens.numel()} tokens, fp32",
                seconds=seconds,
                reference_seconds=reference_seconds,
                reference="the whole model",
                floor_seconds=reference_seconds * kept,
                floor="its time × kept weights",
                target="≥ 80 % of its floor",
                extra={"kept weights": kept},
            )
        )
    return found


def _model() -> Any:
    """The embedded model from the cache, or one of its sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedclient.base_model import DEFAULT_MODEL, cache_folder, load

    if (cache_folder() / DEFAULT_MODEL / "config.json").is_file():
        return load(DEFAULT_MODEL).model.eval()
    configuration = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(configuration).eval()


def _every_fourth_dropped(shape: LayerShape) -> LayerPlan:
    heads, channels = (
        torch.tensor([i for i in range(count) if i % 4 != 3])
        for count in (shape.heads, shape.channels)
    )
    return LayerPlan(shape, heads, heads, channels)
