"""What numbers in messages may be at most: types for pydantic, and the limits behind them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=0, le=10**12)]
# A model that is this sure of something wrong has logits that float32 barely holds.
LARGEST_LOSS = 1e6
Loss = Annotated[float, Field(ge=0, le=LARGEST_LOSS)]
# Far above any change that a model survives, and far below where float32 sums of such overflow.
LARGEST_NORM = 1e15
Norm = Annotated[float, Field(ge=0, le=LARGEST_NORM)]
