"""What every table of a scenario is: strict keys and types, no change afterwards, no NaN."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Strict

T = TypeVar("T")
Several = Annotated[tuple[T, ...], Strict(False)]
"""A list of TOML or JSON, kept so that nothing can be added to it; what is in it is read strictly."""
Two = Annotated[tuple[T, T], Strict(False)]


class Table(BaseModel):
    """Unknown keys are errors, and so is ``true`` or ``"5"`` where a number is wanted."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)
