"""The edge aggregator: it asks its devices what it was asked, and answers with the exact sum.

To its devices it is what the coordinator is to nodes: it puts each its own plan, judges every reply at
the same gate, and lets none of them end a round. To the coordinator it is one node, with one answer to a
question. It plans nothing, holds no model and no data, and keeps nothing between two questions but who
its devices are: what is lost with it is asked again, and devices answer with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from aggregators import GateContext, Layout, UpdateRejected, Verdict
from aggregators.basis import Basis
from aggregators.cohort import Cohort, CohortMember
from aggregators.gate import norm_of
from aggregators.keys import KeyFileError, load_or_create, public_hex
from aggregators.messages import (
    Capabilities,
    DeviceCapabilities,
    Evaluation,
    Plan,
    Report,
    decode_cohort_plan,
    encode_member_plan,
    encode_reply,
    member_plans,
    open_envelope,
)
from aggregators.methods import CohortMethod
from aggregators.signatures import sign_reply
from fedclient.node import Kind, NodeSettings, Refused
from fedserver.events import Listener, Notice
from fedserver.exchange import EVALUATE, FORGOTTEN, QUERY, TRAIN, Exchange
from fedserver.outcome import Outcome, judge, sum_evaluations, unlike_weights
from fedserver.roster import Member, Roster, agree, no_key, read_member

QUERY_SECONDS = 600.0
CONNECT_SECONDS = 240.0
MOST_REASON = 400  # characters; escapes may have made it longer
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class _Asked:
    """What one device is asked, and what its answer is judged by."""

    context: GateContext
    payload: bytes


class EdgeAggregator:
    """Answers the coordinator's questions for the devices that ``exchange`` reaches.

    ``wanted``: how many of them a run waits for before it says who they are.
    """

    def __init__(self, name: str, exchange: Exchange, wanted: int, notify: Listener) -> None:
        self._name = name
        self._exchange = exchange
        self._wanted = wanted
        self._notify = notify
        self._roster: Roster | None = None

    def answer(self, kind: Kind, payload: bytes, settings: NodeSettings) -> bytes:
        """What a node answers to a message of this kind. Raises Refused alone."""
        try:
            if kind == "query":
                return self._capabilities(payload, settings).to_bytes()
            reply = self._work(payload)
            return sign_reply(reply, load_or_create(Path(settings.key))) if settings.key else reply
        except (UpdateRejected, KeyFileError) as error:
            raise Refused(str(error)) from None
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise Refused(f"the devices' sum: {where}: {problem['msg']}") from None

    def _capabilities(self, query: bytes, settings: NodeSettings) -> Capabilities:
        waited = 0.0
        while len(self._exchange.nodes()) < self._wanted and waited < CONNECT_SECONDS:
            self._exchange.wait(POLL_SECONDS)
            waited += POLL_SECONDS
        signs = json.loads(query)["signatures"] == "required"
        members: dict[str, Member] = {}
        problems = []
        nodes = self._exchange.nodes()
        for reply in self._exchange.ask(dict.fromkeys(nodes, query), QUERY, 0, QUERY_SECONDS):
            member, problem = (None, reply.error)
            if reply.payload is not None:
                member, problem = read_member(reply.node_id, reply.payload)
            if member is not None and member.capabilities.devices:
                problem = f"{member.capabilities.node!r} is an edge itself"
                member = None
            if member is not None and signs and member.capabilities.public_key is None:
                problem = no_key(member.capabilities.node)
                member = None
            if member is not None:
                members.setdefault(member.capabilities.node, member)
            elif problem:
                problems.append(problem)
        self._exchange.forget(before_round=1)
        if not members:
            raise Refused(
                f"none of the {len(nodes)} devices behind {self._name!r} can take part: "
                + "; ".join(sorted(set(problems)) or ["none has answered"])
            )
        for problem in sorted(set(problems)):
            self._notify(
                Notice("warning", f"a device of {self._name!r} cannot take part: {problem}")
            )
        self._roster = agree(members, "what most devices here hold", self._notify)
        told = [member.capabilities for member in self._roster.members]
        return Capabilities(
            node=self._name,
            examples=sum(one.examples for one in told),
            held_out=sum(one.held_out for one in told),
            rank_limit=max(one.rank_limit for one in told),
            base_digest=self._roster.base_digest,
            layout_json=self._roster.layout_json,
            threads=os.cpu_count() or 1,
            memory_bytes=0,
            device="edge",
            versions={"python": platform.python_version()},
            public_key=public_hex(load_or_create(Path(settings.key))) if settings.key else None,
            devices=tuple(
                DeviceCapabilities(
                    node=one.node,
                    examples=one.examples,
                    held_out=one.held_out,
                    rank_limit=one.rank_limit,
                    public_key=one.public_key,
                )
                for one in told
            ),
        )

    def _work(self, payload: bytes) -> bytes:
        plan, views = decode_cohort_plan(payload)
        roster = self._roster
        if roster is None or roster.layout.fingerprint != plan.layout:
            # The server then asks who the devices are, and puts its question again.
            raise Refused(f"{self._name!r} does not know its devices: query it first", FORGOTTEN)
        assert isinstance(plan.method, CohortMethod)
        layout = roster.layout
        members = {member.capabilities.node: member for member in roster.members}
        bases: dict[str, Basis | None] = {}
        asked: dict[int, _Asked] = {}
        outcomes: list[Outcome] = []
        for own, group in member_plans(plan):
            sealed = views[group.sent]
            if group.sent not in bases:
                bases[group.sent] = sealed.read(layout).basis
            if own.node not in members:
                outcomes.append(Outcome(own, Verdict.MISSING, "is not connected", round=own.round))
                continue
            context = GateContext(
                layout=layout,
                plan=own,
                max_bytes=plan.method.max_bytes,
                max_examples=plan.method.max_examples,
                view=group.view,
                basis=bases[group.sent],
                public_key=members[own.node].capabilities.public_key,
            )
            member_payload = encode_member_plan(own, sealed)
            asked[members[own.node].node_id] = _Asked(context, member_payload)
        outcomes += self._collect(plan, asked)
        for diverged in unlike_weights(outcomes):
            self._notify(Notice("warning", f"round {plan.round}: {diverged}"))
        return _sum(plan, layout, sorted(outcomes, key=lambda outcome: outcome.plan.node))

    def _collect(self, plan: Plan, asked: dict[int, _Asked]) -> list[Outcome]:
        """The first answer of each device, or its absence."""
        answered: dict[int, Outcome] = {}
        deadline = next((one.context.plan.deadline_seconds for one in asked.values()), 0.0)
        replies = self._exchange.ask(
            {node: one.payload for node, one in asked.items()},
            TRAIN if plan.action == "train" else EVALUATE,
            plan.round,
            deadline,
        )
        for reply in replies:
            # Of a device that answers twice the first answer counts, as a late one never does.
            if not reply.late and reply.node_id not in answered:
                answered[reply.node_id] = judge(reply, asked[reply.node_id].context, set())
        self._exchange.forget(before_round=plan.round + 1)
        for node, one in asked.items():
            if node not in answered:
                own = one.context.plan
                reason = f"no reply within {deadline:g} s"
                answered[node] = Outcome(own, Verdict.MISSING, reason, round=own.round)
            answered[node].bytes_down = len(one.payload)
        return list(answered.values())


def _sum(plan: Plan, layout: Layout, outcomes: Sequence[Outcome]) -> bytes:
    """The edge's reply, unsigned. Raises Refused where there is nothing to send."""
    accepted = [o for o in outcomes if o.verdict is Verdict.ACCEPTED and o.admitted is not None]
    rows = [_row(outcome) for outcome in outcomes]
    updates, reports = [], []
    for outcome in accepted:
        assert outcome.admitted is not None
        report, update = outcome.admitted.report, outcome.admitted.update
        if update is None:
            continue
        assert not isinstance(update, Cohort), "no device behind an edge is an edge"
        updates.append((update, report.examples))
        reports.append(report)
    if not accepted or (plan.action == "train" and not updates):
        words = ", ".join(sorted({o.reason or o.verdict.value for o in outcomes}))[:200]
        raise Refused(f"none of the {len(outcomes)} devices sent what counts: {words}")
    counted = reports or [o.admitted.report for o in accepted if o.admitted is not None]
    evaluation = sum_evaluations(list(accepted))
    report = Report(
        examples=sum(one.examples for one in counted),
        train_loss=_mean([(one.examples, one.train_loss) for one in reports]),
        train_loss_first=_mean([(one.examples, one.train_loss_first) for one in reports]),
        train_tokens=sum(one.train_tokens for one in reports),
        steps=sum(one.steps for one in reports),
        evaluation=Evaluation.model_validate(evaluation) if evaluation else None,
        base_format=plan.base_format,
        unchanged=bool(updates) and all(one.unchanged for one in reports),
    )
    return encode_reply(
        run=plan.run,
        round=plan.round,
        node=plan.node,
        nonce=plan.nonce,
        layout=plan.layout,
        base_digest=plan.base_digest,
        report=report,
        update=Cohort.of(updates, rows) if updates else None,
        dtype=None,
    )


def _mean(losses: Sequence[tuple[int, float | None]]) -> float | None:
    """By examples, of those that say one."""
    known = [(examples, loss) for examples, loss in losses if loss is not None]
    if not known:
        return None
    mean = math.fsum(examples * loss for examples, loss in known) / sum(w for w, _ in known)
    return min(mean, max(loss for _, loss in known))  # rounding may lift it above all of them


def _row(outcome: Outcome) -> CohortMember:
    admitted = outcome.admitted
    told = {
        "node": outcome.plan.node,
        "verdict": outcome.verdict,
        "reason": outcome.reason[:MOST_REASON],
        "bytes_up": outcome.bytes_up,
        "bytes_down": outcome.bytes_down,
    }
    if admitted is not None:
        envelope = open_envelope(admitted.reply).canonical()
        told |= {
            "examples": admitted.report.examples,
            "train_loss": admitted.report.train_loss,
            "weights": admitted.report.weights or "",
            "envelope": hashlib.sha256(envelope).hexdigest(),
            "payload": admitted.payload_digest,
            "norm": norm_of(admitted.update) if admitted.update is not None else None,
        }
        if admitted.signature is not None:
            told |= vars(admitted.signature)
    return CohortMember.model_validate(told)
