"""What a node reports of its local training, whatever the method."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingResult:
    """Losses are means over labelled tokens of the first and of the last optimiser step.

    ``skipped``: measurements without a finite result, from which nothing was learnt. ``residual``: the
    name of what earlier messages left out and this one begins with, "" for none.
    """

    first_loss: float
    last_loss: float
    tokens: int
    steps: int
    skipped: int = 0
    residual: str = ""
