"""What a zeroth-order step lowers: any number that predictions have, differentiable or not.

Predictions are those of one forward pass over the answer (teacher forcing), not generated text: a step
asks for many of them, and they cost what the loss costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """What a model says about the labelled positions of a batch, in their order.

    losses: float64 [labelled], nats; best: int64 [labelled], the likeliest token; labels: int64
    [labelled]; examples: int64 [labelled], the row of the batch that each belongs to.
    """

    losses: Tensor
    best: Tensor
    labels: Tensor
    examples: Tensor

    @property
    def loss(self) -> float:
        """Mean cross-entropy over labelled positions; 0 where there are none."""
        return float(self.losses.sum()) / max(1, len(self.losses))


def token_errors(predictions: Predictions) -> float:
    """Share of labelled tokens that are not predicted."""
    if not len(predictions.labels):
        return 0.0
    return 1.0 - float((predictions.best == predictions.labels).double().mean())


def answer_errors(predictions: Predictions) -> float:
    """Share of examples with a labelled token that is not predicted (1 - exact match)."""
    examples, places = torch.unique(predictions.examples, return_inverse=True)
    if not len(examples):
        return 0.0
    wrong = torch.zeros(len(examples), dtype=torch.int64)
    wrong.index_add_(0, places, (predictions.best != predictions.labels).long())
    return float((wrong > 0).double().mean())


def rouge_l_errors(predictions: Predictions) -> float:
    """1 - the mean over examples of ROUGE-L's F1 on token ids (Lin, 2004, equation 4 with beta 1).

    Both sequences have one length, so precision, recall and F1 are the longest common subsequence
    over that length.
    """
    scores = []
    for example in torch.unique(predictions.examples).tolist():
        chosen = predictions.examples == example
        said, wanted = predictions.best[chosen].tolist(), predictions.labels[chosen].tolist()
        scores.append(longest_common_subsequence(said, wanted) / len(wanted))
    return 1.0 - sum(scores) / len(scores) if scores else 0.0


def longest_common_subsequence(one: list[int], other: list[int]) -> int:
    """Length of the longest sequence that both contain in order, not necessarily in one piece."""
    lengths = [0] * (len(other) + 1)
    for item in one:
        before = 0
        for place, candidate in enumerate(other):
            here = lengths[place + 1]
            lengths[place + 1] = before + 1 if item == candidate else max(here, lengths[place])
            before = here
    return lengths[-1]


OBJECTIVES: dict[str, Callable[[Predictions], float]] = {
    "loss": lambda predictions: predictions.loss,
    "accuracy": token_errors,
    "exact-match": answer_errors,
    "rouge-l": rouge_l_errors,
}
