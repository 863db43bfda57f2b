"""What local training says of itself, whatever the method."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingResult:
    """Losses are means over labelled tokens of the first and of the last step."""

    first_loss: float
    last_loss: float
    tokens: int
    steps: int
