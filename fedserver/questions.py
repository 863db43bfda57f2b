"""What a round asks a node: its plan, the view of the model that goes with it, and both as bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from aggregators import Basis
from aggregators.messages import Plan, encode_plan
from aggregators.methods import (
    HybridMethod,
    LoraMethod,
    ProjectedMethod,
    SketchMethod,
    ZerothOrderMethod,
)
from aggregators.presets import PRESETS
from aggregators.view import View
from fedserver.configuration import RunConfiguration
from fedserver.global_model import GlobalModel, first_basis
from fedserver.planner import make_plan
from fedserver.roster import Member, Roster


@dataclass(frozen=True)
class Question:
    """``view``: digest of the view that the node gets. ``basis``: the round's, for sketches."""

    member: Member
    plan: Plan
    payload: bytes
    view: str
    basis: Basis | None


def question(
    configuration: RunConfiguration,
    roster: Roster,
    member: Member,
    model: GlobalModel,
    round_number: int,
    action: str,
    deadline_seconds: float,
    history: tuple[str, ...] = (),
) -> Question:
    """What one member is asked in a round that begins with ``model``: the same whenever it is made.

    ``history``: the round's names for what the node's messages leave out (``Lineage``).
    """
    plan = make_plan(
        configuration,
        member.capabilities,
        round_number=round_number,
        layout=roster.layout,
        base_digest=roster.base_digest,
        action=action,
        sums=model.sums,
    )
    feedback = (
        isinstance(plan.method, ProjectedMethod | SketchMethod) and plan.method.error_feedback
    )
    named = history if feedback and plan.action == "train" else ()
    plan = plan.model_copy(update={"deadline_seconds": deadline_seconds, "history": named})
    basis = model.basis or first_basis(configuration, roster.layout)
    view = _view(configuration, model, plan, basis)
    return Question(
        member=member,
        plan=plan,
        payload=encode_plan(plan, view, configuration.view_dtype),
        view=view.as_sent(configuration.view_dtype).digest(),
        basis=basis,
    )


def _view(
    configuration: RunConfiguration, model: GlobalModel, plan: Plan, basis: Basis | None
) -> View:
    preset, limits = PRESETS[configuration.preset], view_limits(configuration)
    if plan.action == "evaluate" or not isinstance(plan.method, LoraMethod):
        view = model.common_view(preset, *limits)
        return replace(view, **_beside(model, plan, basis))
    return model.view(preset, plan.method.rank, *limits)


def _beside(model: GlobalModel, plan: Plan, basis: Basis | None) -> dict[str, Any]:
    """What a method needs to know beside the model itself."""
    if plan.action == "train" and isinstance(plan.method, SketchMethod):
        return {"basis": basis}
    if plan.action == "train" and isinstance(plan.method, ZerothOrderMethod | HybridMethod):
        known = model.statistics
        return {"levels": known.levels()} if known is not None else {}
    return {}


def view_limits(configuration: RunConfiguration) -> tuple[int | None, float | None]:
    """Rank and energy of the carry that nodes see."""
    return configuration.view_rank, configuration.view_energy
