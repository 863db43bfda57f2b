"""Collecting a round: put the questions, judge what comes, and say who stayed silent.

A question without an answer stays open for some rounds. Its late answer is judged by its own plan and
enters the round in which it comes, once, or gets the verdict "late".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from aggregators import GateContext, Layout, Verdict
from aggregators.cohort import Cohort
from fedserver import events
from fedserver.configuration import RunConfiguration
from fedserver.device_cost import memory_of
from fedserver.exchange import EVALUATE, TRAIN, Exchange, Reply
from fedserver.ledger import Ledger
from fedserver.newcomers import Churn
from fedserver.open_round import committed_before, recall, remember
from fedserver.outcome import Outcome, judge, replied, unlike_weights
from fedserver.questions import Question
from fedserver.roster import Member
from fedserver.staleness import still_counts


class Collector:
    """Asks the nodes of a run, round by round, and keeps what was not answered in time."""

    def __init__(
        self,
        configuration: RunConfiguration,
        exchange: Exchange,
        ledger: Ledger,
        layout: Layout,
        emit: events.Listener,
        choices: Mapping[str, str],
    ) -> None:
        """Answers that the ledger already holds are never counted again. ``choices``: why a node was
        given its strand, by name, where its limits decided.
        """
        self._choices = choices
        self._configuration = configuration
        self._exchange = exchange
        self._ledger = ledger
        self._layout = layout
        self._emit = emit
        self._seen, _ = committed_before(ledger)
        self._open: dict[tuple[int, int], Question] = {}
        self._arrived_late: list[Reply] = []

    @property
    def busy(self) -> set[str]:
        """Names of the nodes that still train for an earlier round, where that excludes them."""
        if not self._configuration.asynchronous:
            return set()
        return {q.plan.node for q in self._open.values() if q.plan.action == "train"}

    @property
    def open_rounds(self) -> set[int]:
        """Rounds with questions that may still be answered."""
        return {number for _, number in self._open}

    def reopen(self, question: Question) -> None:
        """Take up a question that a server before this one left open.

        It is put again, unless its late answer had arrived: that one enters the next round.
        """
        node_id, plan = question.member.node_id, question.plan
        arrived = recall(self._ledger, {node_id: plan})
        self._arrived_late += [replace(reply, late=True) for reply in arrived]
        if not arrived:
            self._exchange.repeat(
                node_id, question.payload, TRAIN, plan.round, plan.deadline_seconds
            )
        self._open[node_id, plan.round] = question

    def collect(
        self,
        number: int,
        action: str,
        questions: Sequence[Question],
        needed: Callable[[Collection[str]], int],
        deadline: float,
        churn: Churn,
        stops: Callable[[], bool],
    ) -> list[Outcome]:
        """The outcomes of one round, by node: an answer to each question or its absence, then answers to
        earlier questions and second answers. With as many updates as ``needed`` it may close; after
        ``deadline`` seconds it does. ``needed`` is asked with the names of the nodes that were revoked
        meanwhile, for which it does not wait.

        Answers that arrived before the server was started again are not asked for twice. Raises
        Abandoned when ``stops`` says so.
        """
        rules = self._configuration
        trains = action == "train"
        asked = {question.member.node_id: question for question in questions}
        answered: dict[int, Outcome] = {}
        others: list[Outcome] = []
        updates = 0
        revoked: frozenset[str] = frozenset()

        def enough() -> bool:
            return updates >= needed(revoked)

        def leaves() -> list[int]:
            nonlocal revoked
            revoked = churn.revoked()
            asked_ever = {node: q.plan.node for (node, _), q in self._open.items()}
            asked_ever |= {node: question.plan.node for node, question in asked.items()}
            return [node for node, name in asked_ever.items() if name in revoked]

        for reply in recall(self._ledger, {node: q.plan for node, q in asked.items()}):
            outcome = self._judged(reply, number, action, asked)
            if outcome is not None and outcome.admitted is not None:
                updates += outcome.updates
                outcome.bytes_down = len(asked[reply.node_id].payload)
                answered[reply.node_id] = outcome
                self._tell(outcome, number)
        for reply in self._arrived_late:
            outcome = self._judged(reply, number, action, asked)
            if outcome is not None:
                updates += outcome.admitted is not None and outcome.admitted.update is not None
                others.append(outcome)
                self._tell(outcome, number)
        self._arrived_late.clear()
        payloads = {node: q.payload for node, q in asked.items() if node not in answered}
        # The evaluations at the end are of the last round.
        told = min(number, rules.rounds)
        sent = events.PlansSent(told, len(payloads), sum(map(len, payloads.values())))
        replies = self._exchange.ask(
            payloads,
            TRAIN if trains else EVALUATE,
            number,
            deadline,
            enough=enough,
            grace=rules.closing_seconds if trains else None,
            wait_for_late=trains and rules.late == "discount",
            newcomers=churn,
            sent=lambda: self._emit(sent),
            leaves=leaves,
            stops=stops,
        )
        for reply in replies:
            outcome = self._judged(reply, number, action, asked)
            if outcome is None:
                continue
            updates += outcome.updates
            if reply.late or reply.node_id in answered:
                others.append(outcome)
            else:
                outcome.bytes_down = len(asked[reply.node_id].payload)
                answered[reply.node_id] = outcome
            self._tell(outcome, number)
        for node_id, question in asked.items():
            if node_id not in answered:
                shut_out = question.plan.node in revoked
                answered[node_id] = self._missing(
                    question, number, deadline, closed=enough(), revoked=shut_out
                )
                if not shut_out:
                    self._open[node_id, number] = question
        self._give_up(number + 1 - rules.staleness_limit)
        for outcome in answered.values():
            outcome.choice = self._choices.get(outcome.plan.node, "")
            outcome.memory_bytes = memory_of(
                outcome.plan, self._layout, rules.view_rank or 0, rules.pool_in_use
            ).total
        in_order = sorted(answered.values(), key=lambda outcome: outcome.plan.node)
        for diverged in unlike_weights(in_order):
            self._emit(events.Notice("warning", f"round {number}: {diverged}"))
        return in_order + sorted(others, key=lambda o: (o.plan.node, o.round, o.reason))

    def _judged(
        self, reply: Reply, number: int, action: str, asked: Mapping[int, Question]
    ) -> Outcome | None:
        """The verdict on a reply; None for a late one that brings nothing, or is no longer wanted."""
        question = (
            self._open.pop((reply.node_id, reply.round), None)
            if reply.late
            else asked[reply.node_id]
        )
        if question is None or (reply.late and reply.payload is None):
            return None
        counts = (
            reply.late
            and action == "train"
            and still_counts(question.plan, number, self._configuration)
        )
        context = GateContext(
            layout=self._layout,
            plan=question.plan,
            seen_nonces=frozenset(self._seen),
            max_bytes=self._configuration.max_update_bytes,
            max_examples=self._configuration.max_examples,
            view=question.view,
            basis=question.basis,
            public_key=question.member.capabilities.public_key,
        )
        began = time.perf_counter()
        outcome = judge(reply, context, self._seen, late_counts=counts)
        _check_keys(outcome, question.member)
        outcome.gate_seconds = time.perf_counter() - began
        if outcome.admitted is not None:
            outcome.blob = remember(self._ledger, outcome)
            if reply.late:
                outcome.staleness = number - reply.round
                outcome.discount = self._configuration.discount(outcome.staleness)
        return outcome

    def _missing(
        self, question: Question, number: int, deadline: float, *, closed: bool, revoked: bool
    ) -> Outcome:
        verdict, reason = Verdict.MISSING, f"no reply within {deadline:g} s"
        if revoked:
            verdict, reason = Verdict.REVOKED, "shut out by the server's operator before its reply"
        elif closed and self._configuration.closing_seconds is not None:
            reason = "no reply before the round closed with its quorum"
        outcome = Outcome(question.plan, verdict, reason, round=number)
        outcome.bytes_down = len(question.payload)
        self._tell(outcome, number)
        return outcome

    def _give_up(self, before_round: int) -> None:
        self._exchange.forget(before_round)
        self._open = {key: q for key, q in self._open.items() if key[1] >= before_round}

    def _tell(self, outcome: Outcome, number: int) -> None:
        """Announce a reply of a round; of the final evaluation only what went wrong."""
        if outcome.plan.action == "train":
            self._emit(replied(outcome, number))
        elif outcome.verdict is not Verdict.ACCEPTED:
            text = f"final evaluation: {outcome.plan.node}: {outcome.reason}"
            self._emit(events.Notice("warning", text))


def _check_keys(outcome: Outcome, edge: Member) -> None:
    """Refuse a sum with a device's update that the device's own key has not signed, as its edge says."""
    update = outcome.admitted.update if outcome.admitted is not None else None
    if not isinstance(update, Cohort):
        return
    for device in update.members:
        expected = edge.keys.get(device.node, "")
        if device.verdict is Verdict.ACCEPTED and device.key != expected:
            outcome.verdict = Verdict.FOREIGN_KEY if device.key else Verdict.UNSIGNED
            outcome.reason = (
                f"{device.node!r} is known by {expected[:12] or 'no key'}, its update in the sum is"
                f" signed by {device.key[:12] or 'none'}"
            )
            outcome.admitted = None
            return
