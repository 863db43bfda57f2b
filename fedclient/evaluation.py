"""Loss and token accuracy of a model on held-out examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedclient.loss import answer_loss


@dataclass(frozen=True)
class Score:
    """Sums over labelled tokens: ``loss_sum`` in nats, ``correct`` greedy predictions."""

    loss_sum: float
    tokens: int
    correct: int
    examples: int


def evaluate(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Score:
    """Score a model on batches of token ids, without gradients and without dropout."""
    loss_sum, tokens, correct, examples = 0.0, 0, 0, 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                loss, labelled, right = answer_loss(model, batch)
                loss_sum += float(loss)
                tokens += labelled
                correct += right
                examples += len(batch["input_ids"])
    finally:
        model.train(training)
    return Score(loss_sum, tokens, correct, examples)
