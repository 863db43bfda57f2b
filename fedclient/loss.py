"""The answer loss: cross-entropy over labelled tokens, with logits computed only where there are labels.

The head of a small model is a large part of its cost, and most positions of a prompt have no label.
"""

from __future__ import annotations

from torch import Tensor, nn

import fedkernels as fk

IGNORED = -100


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int, int]:
    """Sum of the cross-entropies in nats (differentiable), labelled tokens, correct predictions.

    ``batch``: input_ids, attention_mask, labels, each int64 [batch, length]; labels are -100 where
    there is nothing to predict. A label is predicted from the position before it.
    """
    return fk.causal_loss(model, batch)
