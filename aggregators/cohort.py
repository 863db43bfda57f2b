"""What an edge aggregator sends: its devices' updates as one exact total a family, and who they were.

A cohort stands for its members in the mixing: each total has the weight of those that are in it, so the
aggregate is that of the members themselves, bit for bit, however they were divided over edges.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from aggregators.bounds import Count, Loss, Norm
from aggregators.layout import Layout
from aggregators.pair import parts_of
from aggregators.totals import Total, summed
from aggregators.update import Update, Verdict, require_layout

Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
MOST_EXAMPLES = 10**7  # of one member


class CohortMember(BaseModel):
    """What became of one device's reply at its edge.

    ``envelope``, ``payload``: SHA-256 of its signed envelope and of its update, "" where there is none.
    ``key``, ``signature``: hexadecimal, "" where the device does not sign. ``weights``: its report's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    node: str = Field(min_length=1, max_length=64)
    verdict: Verdict
    reason: str = Field(default="", max_length=400)
    examples: int = Field(default=0, ge=0, le=MOST_EXAMPLES)
    bytes_up: Count = 0
    bytes_down: Count = 0
    norm: Norm | None = None
    train_loss: Loss | None = None
    envelope: Hex = ""
    payload: Hex = ""
    weights: Hex = ""
    key: Hex = ""
    signature: str = Field(default="", pattern=r"^([0-9a-f]{128})?$")


class Cohort:
    """``totals``: one a family (of random projections one a pool), at least one; ``members``: all that
    were asked, by name. Raises ValueError for anything else.
    """

    family: ClassVar[str] = "cohort"

    def __init__(self, totals: Sequence[Total], members: Sequence[CohortMember]) -> None:
        if not totals:
            raise ValueError("a cohort has a total, at least")
        if len({(total.family, total.pool) for total in totals}) != len(totals):
            raise ValueError("a cohort has one total a family and pool")
        if len({member.node for member in members}) != len(members):
            raise ValueError("a cohort names each member once")
        for total in totals:
            require_layout(total.form.layout, totals[0].form.layout)
        self.totals = tuple(sorted(totals, key=lambda total: (total.family, total.pool or 0)))
        self.members = tuple(sorted(members, key=lambda member: member.node))

    @classmethod
    def of(cls, updates: Sequence[tuple[Update, float]], members: Sequence[CohortMember]) -> Cohort:
        """The sum of updates, at least one, each with its weight; stacks longer than full are cut."""
        found = joined(total for update, weight in updates for total in totals_of(update, weight))
        return cls([total.compact() for total in found], members)

    @property
    def layout(self) -> Layout:
        """The coordinate system."""
        layout: Layout = self.totals[0].form.layout
        return layout

    @property
    def accepted(self) -> int:
        """How many members' updates it is the sum of."""
        return sum(m.verdict is Verdict.ACCEPTED and bool(m.payload) for m in self.members)

    def without(self, family: str) -> Cohort | None:
        """The cohort without the members' updates of one family; None where there are no others."""
        kept = [total for total in self.totals if total.family != family]
        return Cohort(kept, self.members) if kept else None

    @functools.cached_property
    def means(self) -> list[Update]:
        """The weighted mean of each total's members."""
        return [total.mean() for total in self.totals]

    def dense(self, layout: Layout | None = None) -> dict[str, Tensor]:
        """The sum of the families' means as float64 tensors; of sketches the coordinates."""
        found: dict[str, Tensor] = {}
        for mean in self.means:
            for name, change in mean.dense(layout or self.layout).items():
                found[name] = found[name] + change if name in found else change
        return found

    def __repr__(self) -> str:
        families = ", ".join(total.family for total in self.totals)
        return f"Cohort({self.accepted} of {len(self.members)} members, {families})"


def totals_of(update: Any, weight: float) -> tuple[Total, ...]:
    """What an update adds to the totals of its families: a cohort's are made already."""
    if isinstance(update, Cohort):
        return update.totals
    return tuple(Total.of(part, weight) for part in parts_of(update))


def joined(totals: Iterable[Total]) -> list[Total]:
    """Totals added where they can be: one a family and pool."""
    found: dict[tuple[str, int | None], list[Total]] = {}
    for total in totals:
        found.setdefault((total.family, total.pool), []).append(total)
    return [summed(some) for some in found.values()]
