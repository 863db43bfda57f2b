"""When a round closes, whom it asks, and what becomes of late updates: a scenario's keys."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fedserver.scenario.table import Table

# Rounds whose states the server still holds.
MOST_STALE = 6
RATIO = re.compile(r"^([1-9]\d{0,3})/([1-9]\d{0,3})$")


class RoundKeys(Table):
    """Keys of the round loop, at the top level of a scenario."""

    quorum: int | float | str | None = Field(
        default=None,
        description="accepted updates that a round needs: a number, or a share of the training nodes"
        " that it asks, as 0.5 or '4/6'; default: more than half",
    )
    deadline_seconds: float = Field(default=3600.0, gt=0)
    grace_seconds: float | None = Field(
        default=None,
        ge=0,
        description="a round closes this long after its quorum is reached; unset: it waits for all",
    )
    late: Literal["drop", "discount"] = Field(
        default="drop", description="updates of an earlier round: refused, or added with a discount"
    )
    staleness_exponent: float = Field(
        default=0.5, ge=0, description="a: an update that is s rounds late counts (1 + s)^-a"
    )
    staleness_limit: int = Field(
        default=2, ge=1, le=MOST_STALE, description="rounds after which an answer is given up"
    )
    participation: float = Field(
        default=1.0, gt=0, le=1, description="share of the training nodes that a round asks"
    )
    asynchronous: bool = Field(
        default=False, description="nodes are asked again when they have answered (FedBuff)"
    )
    buffer: int | None = Field(
        default=None, ge=1, description="updates of an asynchronous round; default: the quorum"
    )

    @field_validator("quorum")
    @classmethod
    def _possible_quorum(cls, value: int | float | str | None) -> int | float | str | None:
        if isinstance(value, str):
            found = RATIO.match(value)
            if found is None or int(found[1]) > int(found[2]):
                raise ValueError(f"quorum {value!r}: write a number, a share, or '4/6'")
        elif isinstance(value, float) and not 0 < value <= 1:
            raise ValueError(f"quorum {value!r}: a share is above 0 and at most 1")
        elif isinstance(value, int) and value < 1:
            raise ValueError(f"quorum {value!r}: at least one update")
        return value

    @model_validator(mode="after")
    def _fitting(self) -> RoundKeys:
        if self.asynchronous and self.late != "discount":
            raise ValueError("asynchronous: most updates are late then; set late = 'discount'")
        if self.asynchronous and self.grace_seconds is not None:
            raise ValueError(
                "asynchronous: a round closes when its buffer is full; no grace_seconds"
            )
        if self.buffer is not None and not self.asynchronous:
            raise ValueError("buffer: only asynchronous rounds have one; set asynchronous = true")
        return self

    @property
    def closing_seconds(self) -> float | None:
        """How long a round stays open after its quorum; None: until all have answered."""
        return 0.0 if self.asynchronous else self.grace_seconds

    def participants(self, training: int) -> int:
        """How many of the training nodes a round asks."""
        return max(1, math.ceil(Fraction(str(self.participation)) * training))

    def needed(self, training: int) -> int:
        """Updates that a round needs which asks so many training nodes."""
        if self.asynchronous and self.buffer is not None:
            return self.buffer
        if self.quorum is None:
            return training // 2 + 1
        if isinstance(self.quorum, int):
            return self.quorum
        return max(1, math.ceil(Fraction(str(self.quorum)) * training))

    def discount(self, staleness: int) -> float:
        """What an update counts that is so many rounds late: (1 + s)^-a."""
        return float((1 + staleness) ** -self.staleness_exponent)
