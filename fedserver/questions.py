"""What a round asks a node: its plan, the view of the model that goes with it, and both as bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from aggregators import Basis
from aggregators.messages import GROUPED, Plan, encode_cohort_plan, encode_plan, seal_view
from aggregators.methods import (
    CohortGroup,
    CohortMethod,
    HybridMethod,
    LoraMethod,
    ProjectedMethod,
    SketchMethod,
    ZerothOrderMethod,
)
from aggregators.presets import PRESETS
from aggregators.view import SealedView, View
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
    history: Callable[[str], tuple[str, ...]] = lambda node: (),
) -> Question:
    """What one member is asked in a round that begins with ``model``: the same whenever it is made.

    ``history``: by node the round's names for what its messages leave out (``Lineage``).
    """
    if member.capabilities.devices:
        return _cohort_question(
            configuration, roster, member, model, round_number, action, deadline_seconds, history
        )
    plan = make_plan(
        configuration,
        member.capabilities,
        round_number=round_number,
        layout=roster.layout,
        base_digest=roster.base_digest,
        action=action,
        sums=model.sums,
    )
    named = history(plan.node) if _keeps(plan) else ()
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


def _cohort_question(
    configuration: RunConfiguration,
    roster: Roster,
    member: Member,
    model: GlobalModel,
    round_number: int,
    action: str,
    deadline_seconds: float,
    history: Callable[[str], tuple[str, ...]],
) -> Question:
    """What an edge is asked: its devices' plans, those that are alike told once, and each view once."""
    given: dict[str, Any] = {
        "round_number": round_number,
        "layout": roster.layout,
        "base_digest": roster.base_digest,
        "action": action,
        "sums": model.sums,
    }
    basis = model.basis or first_basis(configuration, roster.layout)
    groups: dict[str, dict[str, Any]] = {}
    views: dict[str, SealedView] = {}
    for device in member.capabilities.devices:
        plan = make_plan(configuration, device, **given)
        named = history(plan.node) if _keeps(plan) else ()
        plan = plan.model_copy(update={"history": named})
        told = {name: getattr(plan, name) for name in GROUPED}
        key = plan.model_dump_json(include=set(GROUPED))
        if key not in groups:
            view = _view(configuration, model, plan, basis)
            sent, sealed = seal_view(view, configuration.view_dtype)
            views[sent] = sealed
            digest = view.as_sent(configuration.view_dtype).digest()
            groups[key] = told | {"view": digest, "sent": sent, "members": []}
        groups[key]["members"].append((plan.node, plan.nonce, plan.seed))
    found = [CohortGroup.model_validate(group) for _, group in sorted(groups.items())]
    trains = any(group.action == "train" for group in found)
    plan = make_plan(configuration, member.capabilities, **given).model_copy(
        update={
            "action": "train" if trains else "evaluate",
            "method": CohortMethod(
                groups=tuple(found),
                max_bytes=configuration.max_update_bytes,
                max_examples=configuration.max_examples,
            ),
            "deadline_seconds": deadline_seconds,
        }
    )
    return Question(member, plan, encode_cohort_plan(plan, views), "", basis)


def _keeps(asked: Plan) -> bool:
    """Whether a node keeps what its message will leave out."""
    method = asked.method
    feedback = isinstance(method, ProjectedMethod | SketchMethod) and method.error_feedback
    return feedback and asked.action == "train"


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
