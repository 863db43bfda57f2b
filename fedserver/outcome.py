"""What one node's reply comes to: through the gate to an accepted update, or to a typed verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aggregators import UpdateRejected, Verdict
from aggregators.cohort import Cohort
from aggregators.gate import Admitted, GateContext, admit, norm_of
from aggregators.messages import Evaluation, Plan
from aggregators.methods import BaseFormat, CohortMethod, label
from aggregators.signatures import split_signature
from fedserver import events
from fedserver.exchange import Reply


@dataclass
class Outcome:
    """What one node's reply came to; becomes a row of the round's ledger entry.

    ``bytes_up`` is without a signature: signed and unsigned runs have the same entries.
    """

    plan: Plan
    verdict: Verdict
    reason: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    admitted: Admitted | None = None
    blob: str | None = None
    round: int = 0
    share: float = 0.0
    memory_bytes: int = 0
    choice: str = ""
    measured: Mapping[str, int] = field(default_factory=dict)
    staleness: int = 0
    discount: float = 1.0
    gate_seconds: float = 0.0

    @property
    def updates(self) -> int:
        """How many nodes' updates it brings."""
        update = self.admitted.update if self.admitted is not None else None
        return update.accepted if isinstance(update, Cohort) else int(update is not None)

    @property
    def fresh(self) -> bool:
        """Whether it is accepted and answers the round that it is counted in."""
        return self.verdict is Verdict.ACCEPTED and self.staleness == 0


def judge(
    reply: Reply, context: GateContext, seen: set[str], *, late_counts: bool = False
) -> Outcome:
    """Pass a reply through the gate. Every way that it can be wrong ends in a verdict.

    ``late_counts``: an answer to an earlier round's plan is judged by that plan, and may be accepted.
    """
    plan = context.plan
    outcome = Outcome(
        plan,
        Verdict.ACCEPTED,
        bytes_up=len(split_signature(reply.payload or b"")[0]),
        seconds=reply.seconds,
        round=reply.round,
        measured=reply.memory,
    )
    if reply.payload is None:
        outcome.verdict, outcome.reason = Verdict.FAILED, reply.error
        return outcome
    if reply.late and not late_counts:
        outcome.verdict = Verdict.LATE
        outcome.reason = f"answers round {reply.round} after its deadline"
        return outcome
    try:
        outcome.admitted = admit(reply.payload, context)
    except UpdateRejected as rejection:
        outcome.verdict, outcome.reason = rejection.verdict, rejection.detail
        return outcome
    seen.add(plan.nonce)
    if outcome.admitted.report.unchanged:
        outcome.reason = "found nothing to change"
    return outcome


def examples(outcome: Outcome) -> int:
    assert outcome.admitted is not None
    return outcome.admitted.report.examples


def unlike_weights(outcomes: Sequence[Outcome]) -> list[str]:
    """What to say of nodes whose weights are not those that most made of the same view.

    Digests are compared among nodes of one base type and format, whether the nodes answer themselves or
    through an edge. Where as many made others, as with two
    nodes, nobody is in the right: all are named. The digests themselves stand in the nodes' reports.
    """
    made: dict[tuple[str, str], dict[str, str]] = {}
    for outcome in outcomes:
        for node, base_format, digest in _weights(outcome):
            made.setdefault((outcome.plan.dtype, base_format), {})[node] = digest
    found = []
    for digests in made.values():
        votes = Counter(digests.values())
        (expected, most), *others = votes.most_common()
        if others and others[0][1] == most:
            told = ", ".join(f"{node} {digest[:12]}" for node, digest in sorted(digests.items()))
            found.append(f"nodes made unlike weights of the same view: {told}")
            continue
        found += [
            f"{node}'s weights {digest[:12]} are not the {expected[:12]} that"
            f" {most} nodes made of the same view"
            for node, digest in sorted(digests.items())
            if digest != expected
        ]
    return found


def _weights(outcome: Outcome) -> Iterator[tuple[str, BaseFormat, str]]:
    """Of each node that says one: its name, what it holds of the base, the digest of its weights."""
    admitted, plan = outcome.admitted, outcome.plan
    if admitted is None:
        return
    if admitted.report.weights is not None:
        yield plan.node, plan.base_format, admitted.report.weights
    if isinstance(plan.method, CohortMethod) and isinstance(admitted.update, Cohort):
        formats = {m[0]: group.base_format for group in plan.method.groups for m in group.members}
        for member in admitted.update.members:
            if member.weights:
                yield member.node, formats[member.node], member.weights


def sum_evaluations(outcomes: list[Outcome]) -> dict[str, Any] | None:
    """Token sums over all nodes' held-out data, added in the order of the nodes' names."""
    found = [o.admitted.report.evaluation for o in outcomes if o.admitted is not None]
    evaluations: list[Evaluation] = [e for e in found if e is not None and e.tokens > 0]
    if not evaluations:
        return None
    return {key: sum(getattr(e, key) for e in evaluations) for key in Evaluation.model_fields}


def evaluations_by_format(outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """``sum_evaluations`` of the nodes of each base format: a quantised base is another model."""
    formats = sorted({outcome.plan.base_format for outcome in outcomes})
    sums = {f: sum_evaluations([o for o in outcomes if o.plan.base_format == f]) for f in formats}
    return {name: one for name, one in sums.items() if one is not None}


def row(outcome: Outcome) -> dict[str, Any]:
    admitted = outcome.admitted
    found: dict[str, Any] = {
        "node": outcome.plan.node,
        "round": outcome.round,
        "plan": outcome.plan.model_dump(mode="json", exclude={"data"}),
        "base_format": outcome.plan.base_format,
        "choice": outcome.choice,
        "sends": label(outcome.plan.method, outcome.plan.base_format),
        "verdict": outcome.verdict.value,
        "reason": outcome.reason,
        "bytes_up": outcome.bytes_up,
        "bytes_down": outcome.bytes_down,
        "update": outcome.blob,
        "share": outcome.share,
        "memory_bytes": outcome.memory_bytes,
    }
    if outcome.staleness:
        found |= {"staleness": outcome.staleness, "discount": outcome.discount}
    if admitted is not None:
        found |= {"report": admitted.report.model_dump(mode="json")}
        if admitted.update is not None:
            found |= {
                "norm": norm_of(admitted.update),
                "family": admitted.update.family,
            }
        if isinstance(admitted.update, Cohort):
            found |= {"members": _members(admitted.update, outcome.plan)}
    return found


def _members(cohort: Cohort, plan: Plan) -> list[dict[str, Any]]:
    """What a row says of the nodes behind an edge."""
    assert isinstance(plan.method, CohortMethod)
    families = {
        name: group.method.family if group.action == "train" else None
        for group in plan.method.groups
        for name, _, _ in group.members
    }
    return [
        member.model_dump(mode="json", exclude_defaults=True) | {"family": families[member.node]}
        for member in cohort.members
    ]


def signatures(outcomes: Sequence[Outcome]) -> dict[str, dict[str, str]]:
    """By the digest of a signed reply: the node's key and its signature."""
    return {
        outcome.blob: vars(outcome.admitted.signature)
        for outcome in outcomes
        if outcome.blob and outcome.admitted and outcome.admitted.signature
    }


def replied(outcome: Outcome, number: int) -> events.NodeReplied:
    report = outcome.admitted.report if outcome.admitted is not None else None
    return events.NodeReplied(
        round=number,
        node=outcome.plan.node,
        verdict=outcome.verdict.value,
        reason=outcome.reason,
        sends=label(outcome.plan.method, outcome.plan.base_format),
        train_loss_first=report.train_loss_first if report else None,
        train_loss=report.train_loss if report else None,
        bytes_up=outcome.bytes_up,
        bytes_down=outcome.bytes_down,
        seconds=outcome.seconds,
        family=outcome.plan.method.family,
        gate_seconds=outcome.gate_seconds,
    )


def seconds_by_node(outcomes: list[Outcome]) -> dict[str, float | None]:
    """By node; of a node that answered twice the first answer's, and the first is in the list first."""
    return {outcome.plan.node: outcome.seconds for outcome in reversed(outcomes)}


def memory_by_node(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """By node, of its first answer: what it measured, beside the hashed content as seconds are."""
    return {outcome.plan.node: dict(outcome.measured) for outcome in reversed(outcomes)}
