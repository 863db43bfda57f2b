"""Updates that answer an earlier round: which of them can still be added, and for how much.

The change of an earlier round is added to the model as it is now, scaled by (1 + s)^-a; its weight in
the mean stays what its examples give it, so that a discount also holds where it stands alone.
"""

from __future__ import annotations

from aggregators import Update
from aggregators.cohort import Cohort
from aggregators.messages import Plan
from aggregators.methods import HybridMethod, LoraMethod, ZerothOrderMethod
from fedserver.ledger import Ledger
from fedserver.scenario.rounds import RoundKeys


def still_counts(plan: Plan, round_number: int, rules: RoundKeys) -> bool:
    """Whether the update that a plan of an earlier round asked for may enter this one.

    Low-rank change and scalars along the run's pool mean the same in every round. Sketches and random
    projections are seen through their own round's basis, so that they add to nothing of this one.
    """
    return (
        rules.late == "discount"
        and plan.action == "train"
        and 0 < round_number - plan.round <= rules.staleness_limit
        and isinstance(plan.method, (LoraMethod, ZerothOrderMethod, HybridMethod))
    )


def discounted(update: Update | Cohort, discount: float) -> Update | Cohort:
    """The update as it enters the aggregate; one that is not late, as no cohort is, keeps its bytes."""
    if discount == 1.0 or isinstance(update, Cohort):
        return update
    return update * discount


def unanswered(ledger: Ledger, rules: RoundKeys) -> list[tuple[str, int]]:
    """The questions (node, round) to which an answer may still come, oldest first.

    They are in the ledger as missing, and no later row answers them.
    """
    open_questions: dict[tuple[str, int], None] = {}
    newest = 0
    for entry in ledger.entries("round"):
        newest = entry.round
        for row in entry.content["nodes"]:
            key = (row["node"], row["round"])
            if row["round"] == entry.round and row["verdict"] == "missing":
                open_questions[key] = None
            elif row["round"] < entry.round:
                open_questions.pop(key, None)
    return [key for key in open_questions if newest + 1 - key[1] <= rules.staleness_limit]
