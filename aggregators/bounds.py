"""What any message may claim at most: of one node, and of the sum of those behind an edge."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MOST_COUNTED = 10**12
MOST_LOSS_SUM = 1e15
# As many as may stand behind an edge.
MOST_DEVICES = 10**6
Count = Annotated[int, Field(ge=0, le=MOST_COUNTED)]
Sum = Annotated[int, Field(ge=0, le=MOST_COUNTED * MOST_DEVICES)]
# A model that is this sure of something wrong has logits that float32 barely holds.
LARGEST_LOSS = 1e6
Loss = Annotated[float, Field(ge=0, le=LARGEST_LOSS)]
LossSum = Annotated[float, Field(ge=0, le=MOST_LOSS_SUM * MOST_DEVICES)]
# Sums of the largest losses may be rounded up.
ROUNDED_UP = 1 + 1e-9
# Far above any change that a model survives, and far below where float32 sums of such overflow.
LARGEST_NORM = 1e15
Norm = Annotated[float, Field(ge=0, le=LARGEST_NORM)]
