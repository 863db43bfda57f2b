"""The cross-entropy over a large vocabulary, a block of words at a time: logits are never all there.

The head of a small model is a large part of it. Every block of its rows is read once for all positions,
where chunks of positions would read the whole head once each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fedkernels as fk

# Words of a block: 1024 positions of it take 8 MiB in float32.
BLOCK = 2048

# (first word, past the last) -> logits [positions, words], valid until the next call.
Logits = Callable[[int, int], Tensor]


def streamed_losses(logits: Logits, vocabulary: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, float64 [positions], and the likeliest word, int64 [positions].

    labels: int64 [positions], each in [0, vocabulary).
    """
    count = len(labels)
    log_sums = torch.full((count,), -torch.inf, dtype=torch.float64)
    wanted = torch.zeros(count, dtype=torch.float64)
    highest = torch.full((count,), -torch.inf, dtype=torch.float64)
    best = torch.zeros(count, dtype=torch.int64)
    if not count:
        return wanted, best
    positions, first_word = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    for first in range(0, vocabulary, BLOCK):
        past = min(first + BLOCK, vocabulary)
        block = logits(first, past)
        losses, place = fk.logit_losses(block, first_word)
        # The loss of the block's first word and its logit together are the block's log-sum-exp.
        log_sums = torch.logaddexp(log_sums, losses.double() + block[:, 0].double())
        inside = (labels >= first) & (labels < past)
        wanted[inside] = block[inside, labels[inside] - first].double()
        peak = block[positions, place].double()
        higher = peak > highest
        highest = torch.where(higher, peak, highest)
        best = torch.where(higher, place + first, best)
    return log_sums - wanted, best
