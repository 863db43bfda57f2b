"""The round loop: plan, send, gate, aggregate, commit. It survives whatever a node replies."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aggregators import Verdict
from aggregators.presets import PRESETS
from fedserver import events, metrics
from fedserver.closing import evaluate_last, measure_contributions
from fedserver.collection import Collector
from fedserver.configuration import ConfigurationError, RunConfiguration, to_toml
from fedserver.device_choice import with_choices
from fedserver.exchange import Abandoned, Exchange
from fedserver.global_model import GlobalModel, Mixed, next_model
from fedserver.ledger import Entry, Ledger
from fedserver.lineage import Lineage
from fedserver.newcomers import Churn
from fedserver.open_round import committed_before
from fedserver.opening import begin, missing, run_started
from fedserver.operations import Operations
from fedserver.outcome import (
    Outcome,
    evaluations_by_format,
    examples,
    memory_by_node,
    row,
    seconds_by_node,
    signatures,
    sum_evaluations,
)
from fedserver.participation import asked_in, training
from fedserver.planner import check_targets
from fedserver.questions import Question, question, view_limits
from fedserver.replay import last_state, restore
from fedserver.roster import Member, Roster, gather_roster
from fedserver.run_folder import open_existing
from fedserver.staleness import discounted, unanswered


class Coordinator:
    """Runs the rounds of one configuration over a Flower grid into one run directory."""

    def __init__(
        self,
        configuration: RunConfiguration,
        exchange: Exchange,
        folder: Path,
        *,
        emit: events.Listener,
        resume: bool = False,
        key_file: Path | None = None,
        enrolled: Mapping[str, str] | None = None,
        revoked: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        """``key_file``: the server's private key, by default one in the folder. ``enrolled``: the
        nodes' public keys, by name. ``revoked``: names of the nodes that are shut out now.
        """
        self._asked = self._configuration = configuration
        self._choices: dict[str, str] = {}
        self._lineage = Lineage()
        self._preset = PRESETS[configuration.preset]
        self._exchange = exchange
        self._folder = folder
        self._emit = emit
        self._resume = resume
        self._key_file = key_file
        self._enrolled = enrolled
        self._revoked = revoked

    def run(self) -> dict[str, Any]:
        """Run to the configured number of rounds; returns the summary that it also writes."""
        # The order of floating-point sums, so the bits of the state, depends on the threads.
        torch.set_num_threads(self._configuration.threads)
        try:
            summary = self._open_and_run()
        except BaseException as error:
            outcome = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self._emit(events.RoundsEnded(outcome, str(error)))
            raise
        stopped_by, short = self._operations.stopped_by, metrics.shortfall(summary)
        if stopped_by:
            self._emit(events.RoundsEnded("stopped", f"stopped by {stopped_by}"))
        else:
            self._emit(events.RoundsEnded("no_quorum" if short else "finished", short))
        return summary

    def _open_and_run(self) -> dict[str, Any]:
        # A folder of another run must be found out before the nodes are set to work.
        with ExitStack() as stack:
            ledger = open_existing(
                self._folder, self._configuration, resume=self._resume, key_file=self._key_file
            )
            if ledger is not None:
                stack.callback(ledger.close)
            known = committed_before(ledger)[1] if ledger is not None else {}
            roster = gather_roster(
                self._configuration,
                self._exchange,
                self._emit,
                enrolled=self._enrolled,
                known=known,
                revoked=self._revoked,
            )
            self._configuration, self._choices = with_choices(self._configuration, roster.layout)
            targets = check_targets(self._configuration, roster.layout)
            if ledger is None:
                ledger = Ledger(self._folder, create=True, key_file=self._key_file)
                stack.callback(ledger.close)
            collector = Collector(
                self._configuration,
                self._exchange,
                ledger,
                roster.layout,
                self._emit,
                self._choices,
            )
            churn = Churn(
                roster, self._configuration, self._emit, self._enrolled, known, self._revoked
            )
            return self._run(ledger, churn, collector, targets)

    def _run(
        self, ledger: Ledger, churn: Churn, collector: Collector, targets: list[str]
    ) -> dict[str, Any]:
        configuration, roster = self._configuration, churn.roster
        (self._folder / "scenario.toml").write_text(to_toml(self._asked), encoding="utf-8")
        begin(ledger, roster, self._asked, configuration)
        model, done = restore(ledger, configuration)
        members = [member.capabilities.node for member in roster.members]
        operations = Operations(ledger, configuration, members, self._emit)
        self._operations = operations
        self._announce(roster, done + 1, targets)
        self._reopen(ledger, roster, collector)
        try:
            for number in range(done + 1, configuration.rounds + 1):
                model = operations.before(
                    number,
                    model,
                    partial(self._attendance, churn, collector, number),
                    lambda: self._exchange.meet(churn),
                )
                if operations.stopped_by:
                    break
                model = self._round(number, model, ledger, churn, collector)
                metrics.write(ledger, configuration, self._folder / "metrics.jsonl")
            operations.end()
            if not operations.stopped_by:
                ask = partial(self._evaluated_by_all, churn, collector)
                if configuration.evaluate:
                    evaluate_last(ledger, configuration, model, ask, self._emit)
                if configuration.contributions:
                    measure_contributions(ledger, configuration, ask, self._emit)
        except Abandoned:
            pass  # Operations know who wanted it.
        operations.end()
        metrics.write(ledger, configuration, self._folder / "metrics.jsonl")
        summary = metrics.summarise(ledger, configuration, roster.layout, targets)
        metrics.write_json(summary, self._folder / "summary.json")
        return summary

    def _announce(self, roster: Roster, first_round: int, targets: list[str]) -> None:
        baselines = metrics.baselines(roster.layout, targets)
        real_time = self._exchange.real_time
        self._emit(
            run_started(
                self._configuration, roster, self._folder, first_round, baselines, real_time
            )
        )
        for text in missing(self._configuration, roster, self._revoked()):
            self._emit(events.Notice("warning", text))
        for name, reason in self._choices.items():
            self._emit(events.Notice("info", f"{name}: {reason}"))

    def _reopen(self, ledger: Ledger, roster: Roster, collector: Collector) -> None:
        """Take up what a server before this one had asked: late answers count as if it went on."""
        members = {member.capabilities.node: member for member in roster.members}
        states = {entry.round: entry.content["state"] for entry in ledger.entries("round")}
        for name, number in unanswered(ledger, self._configuration):
            # A sum that comes late is refused, so that an edge is not asked for it again.
            if name not in members or members[name].capabilities.devices:
                continue
            before = self._operations.entering(number)
            model = GlobalModel.empty(roster.layout)
            if before > 0:
                if not ledger.has(states[before]):
                    continue
                model = GlobalModel.from_bytes(ledger.get(states[before]), roster.layout)
            member = members[name]
            asked = question(
                self._configuration,
                roster,
                member,
                model,
                number,
                "train",
                self._operations.deadline_seconds(number),
                Lineage.before(ledger, number).history,
            )
            collector.reopen(asked)

    def _round(
        self,
        number: int,
        model: GlobalModel,
        ledger: Ledger,
        churn: Churn,
        collector: Collector,
    ) -> GlobalModel:
        self._emit(events.RoundStarted(number))
        started, monotonic = time.time(), time.monotonic()
        configuration, roster = self._configuration, churn.roster
        self._emit(events.PhaseStarted(number, "plan"))
        shut_out = churn.revoked()
        asked = asked_in(configuration, self._present(roster, shut_out), number, collector.busy)
        able = sum(training(configuration, member) for member in asked)

        def needs(revoked: Collection[str]) -> int:
            """Of those that it asks and that are not revoked."""
            left = (one for one in asked if one.capabilities.node not in revoked)
            needed = configuration.needed(sum(training(configuration, one) for one in left))
            if configuration.asynchronous:
                needed = configuration.minimum_updates()
            return self._operations.quorum(number, needed)

        needed = needs(())
        if shut_out and able < needed and not configuration.asynchronous:
            raise ConfigurationError(
                f"{able} nodes may still train and a round needs {needed} updates, since"
                f" {', '.join(sorted(shut_out))} was revoked: let a node join in its place, then"
                " --resume"
            )
        self._lineage.catch_up(ledger)
        questions = self._questions(asked, roster, model, number, "train")
        deadline = self._operations.deadline_seconds(number)
        self._emit(events.PhaseStarted(number, "train", len(questions), needed, deadline))
        outcomes = collector.collect(
            number, "train", questions, needs, deadline, churn, self._operations.stops_now
        )
        gone = {o.plan.node for o in outcomes if o.verdict is Verdict.REVOKED}
        if gone:
            needed, left = needs(gone), sum(one.capabilities.node not in gone for one in asked)
            text = f"round {number}: of the {left} nodes that are left it needs {needed} updates"
            self._emit(events.Notice("info", text))
        for told in filter(None, map(self._lineage.lost, outcomes)):
            self._emit(events.Notice("warning", f"round {number}: {told}"))
        accepted = [o for o in outcomes if o.verdict is Verdict.ACCEPTED]
        updates = [o for o in accepted if o.admitted is not None and o.admitted.update is not None]
        self._emit(events.PhaseStarted(number, "aggregate"))
        came = sum(outcome.updates for outcome in updates)
        quorum = came >= needed
        following, mixed = self._fold(model, updates) if quorum else (model, None)
        if not quorum:
            self._emit(
                events.Notice(
                    "warning",
                    f"round {number}: {came} updates accepted,"
                    f" {needed} needed; the model stays as it was",
                )
            )
        self._emit(events.PhaseStarted(number, "commit"))
        state = ledger.put(following.to_bytes())
        fresh = [outcome for outcome in accepted if outcome.fresh]
        entering = sum_evaluations(fresh)
        head = following.common_view(self._preset, *view_limits(configuration))
        content = {
            "quorum": quorum,
            "mixing": {"weights": mixed.weights, "cosines": mixed.cosines} if mixed else {},
            "entering": entering,
            "entering_by_format": evaluations_by_format(fresh),
            "nodes": [row(outcome) for outcome in outcomes],
            "state": state,
            "carry_rank": following.carry.rank,
            "view_rank": max(head.adapter.ranks.values(), default=0) if head.adapter else 0,
            "seeds": sum(one.used for one in following.sums),
            "tail_energy": self._tail_energy(following),
        }
        wall = {
            "started": started,
            "seconds": time.monotonic() - monotonic,
            "nodes": seconds_by_node(outcomes),
            "memory": memory_by_node(outcomes),
        }
        kept = {state, last_state(ledger), *_states_before(ledger, collector.open_rounds)}
        entry = ledger.append("round", number, content, wall, signatures(outcomes))
        ledger.keep_states(kept - {""})
        self._report(entry, entering)
        return following

    def _fold(self, model: GlobalModel, accepted: list[Outcome]) -> tuple[GlobalModel, Mixed]:
        weighted = []
        for outcome in accepted:
            assert outcome.admitted is not None
            assert outcome.admitted.update is not None
            update = discounted(outcome.admitted.update, outcome.discount)
            weighted.append((update, examples(outcome)))
        following, mixed = next_model(model, weighted, self._configuration)
        for outcome, share in zip(accepted, mixed.shares, strict=True):
            outcome.share = share
        return following, mixed

    def _questions(
        self,
        members: Sequence[Member],
        roster: Roster,
        model: GlobalModel,
        number: int,
        action: str,
    ) -> list[Question]:
        deadline = self._operations.deadline_seconds(number)
        return [
            question(
                self._configuration,
                roster,
                member,
                model,
                number,
                action,
                deadline,
                self._lineage.history,
            )
            for member in members
        ]

    def _present(self, roster: Roster, revoked: Collection[str]) -> list[Member]:
        """The members that no operator has taken out, with those of their devices that none has."""
        return roster.without({*self._operations.excluded, *revoked})

    def _attendance(self, churn: Churn, collector: Collector, number: int) -> tuple[int, int]:
        """How many updates may come in a round, and how many it needs, as operators have left it."""
        configuration = self._configuration
        present = self._present(churn.roster, churn.revoked())
        asked = asked_in(configuration, present, number, collector.busy)
        able = sum(training(configuration, member) for member in asked)
        if configuration.asynchronous:
            # Answers to earlier rounds count too, and a few nodes may do in time.
            return sum(training(configuration, member) for member in present), 1
        return able, self._operations.quorum(number, configuration.needed(able))

    def _evaluated_by_all(
        self, churn: Churn, collector: Collector, number: int, model: GlobalModel
    ) -> list[Outcome]:
        roster = churn.roster
        present = self._present(roster, churn.revoked())
        questions = self._questions(present, roster, model, number, "evaluate")
        deadline = self._operations.deadline_seconds(number)
        last = min(number, self._configuration.rounds)  # which is evaluated
        self._emit(events.PhaseStarted(last, "evaluate", len(questions), 0, deadline))
        return collector.collect(
            number,
            "evaluate",
            questions,
            lambda revoked: len(questions),
            deadline,
            churn,
            self._operations.stops_now,
        )

    def _tail_energy(self, model: GlobalModel) -> float:
        if self._preset.view == "whole":
            return 0.0
        return model.carry.tail_energy(*view_limits(self._configuration))

    def _report(self, entry: Entry, entering: dict[str, Any] | None) -> None:
        evaluated = metrics.evaluation_done(self._operations.entering(entry.round), entering)
        if evaluated is not None:
            self._emit(evaluated)
        row = metrics.round_row(entry, None)
        self._emit(
            events.RoundCommitted(
                round=entry.round,
                loss=row["loss"],
                accepted=row["accepted"],
                rejected=row["rejected"],
                bytes_up=row["bytes_up"],
                bytes_down=row["bytes_down"],
                seconds=row["seconds"],
                carry_rank=row["carry_rank"],
                tail_energy=row["tail_energy"],
                head=row["head"],
                quorum=row["quorum"],
            )
        )


def _states_before(ledger: Ledger, rounds: set[int]) -> set[str]:
    """The states with which rounds began, but for the first's, which is the base model."""
    return {e.content["state"] for e in ledger.entries("round") if e.round + 1 in rounds}
