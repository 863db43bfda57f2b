"""Pruning: what matters least, which heads, channels or weights go, and the smaller model.

    scores = layer_scores(model, lambda name, linear, sums: magnitude(linear.weight, sums))
    plan = derive_plan(layer_shapes(model), scores, head_ratio=0.25, channel_ratio=0.25)
    small = gather(model, plan)                       # trains and runs like any other model
    change = scatter_factors(factors_of(small), plan)  # and its change is one of the whole model

`importance` has the scores, `masks` the choice of single weights, `plan` that of whole heads and
channels, `gather` the way there and back.
"""

from fedkernels.pruning.adapter_scores import adapter_scores
from fedkernels.pruning.gather import gather, gather_factors, scatter, scatter_factors
from fedkernels.pruning.importance import (
    lora_gradient,
    magnitude,
    moving_average,
    taylor,
    wanda,
)
from fedkernels.pruning.input_norms import InputNorms
from fedkernels.pruning.masks import two_of_four_mask, unstructured_mask
from fedkernels.pruning.plan import Indices, LayerPlan, PruningPlan, derive_plan
from fedkernels.pruning.structure import LayerShape, layer_scores, layer_shapes

__all__ = [
    "Indices",
    "InputNorms",
    "LayerPlan",
    "LayerShape",
    "PruningPlan",
    "adapter_scores",
    "derive_plan",
    "gather",
    "gather_factors",
    "layer_scores",
    "layer_shapes",
    "lora_gradient",
    "magnitude",
    "moving_average",
    "scatter",
    "scatter_factors",
    "taylor",
    "two_of_four_mask",
    "unstructured_mask",
    "wanda",
]
