"""The round loop: plan, send, gate, aggregate, commit. It survives whatever a node replies."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aggregators import Basis, GateContext, Layout, Verdict
from aggregators.messages import Plan, encode_plan
from aggregators.methods import LoraMethod, SketchMethod
from aggregators.presets import PRESETS
from aggregators.view import View
from fedserver import events, metrics
from fedserver.configuration import RunConfiguration, to_toml
from fedserver.device_cost import memory_bytes
from fedserver.exchange import EVALUATE, TRAIN, Exchange
from fedserver.global_model import GlobalModel, first_basis, next_model
from fedserver.ledger import Entry, Ledger, LedgerError
from fedserver.outcome import (
    Outcome,
    examples,
    judge,
    replied,
    row,
    sum_evaluations,
    unlike_weights,
)
from fedserver.planner import check_targets, make_method, make_plan
from fedserver.replay import restore, without
from fedserver.roster import Member, Roster, gather_roster
from fedserver.run_folder import open_existing


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
    ) -> None:
        self._configuration = configuration
        self._preset = PRESETS[configuration.preset]
        self._exchange = exchange
        self._folder = folder
        self._emit = emit
        self._resume = resume
        self._seen: set[str] = set()

    def run(self) -> dict[str, Any]:
        """Run to the configured number of rounds; returns the summary that it also writes."""
        # The order of floating-point sums, so the bits of the state, depends on the threads.
        torch.set_num_threads(self._configuration.threads)
        # A folder of another run must be found out before the nodes are set to work.
        existing = open_existing(self._folder, self._configuration, resume=self._resume)
        roster = gather_roster(self._configuration, self._exchange, self._emit)
        targets = check_targets(self._configuration, roster.layout)
        ledger = existing or Ledger(self._folder, create=True)
        try:
            return self._run(ledger, roster, targets)
        finally:
            ledger.close()

    def _run(self, ledger: Ledger, roster: Roster, targets: list[str]) -> dict[str, Any]:
        configuration = self._configuration
        (self._folder / "scenario.toml").write_text(to_toml(configuration), encoding="utf-8")
        self._begin(ledger, roster)
        model, done = restore(ledger, configuration)
        self._announce(roster, done + 1)
        for number in range(done + 1, configuration.rounds + 1):
            model = self._round(number, model, ledger, roster)
            metrics.write(ledger, configuration, self._folder / "metrics.jsonl")
        if configuration.evaluate and not _evaluated(ledger, configuration.rounds):
            self._final_evaluation(model, ledger, roster)
        if configuration.contributions:
            self._contributions(ledger, roster)
        metrics.write(ledger, configuration, self._folder / "metrics.jsonl")
        summary = metrics.summarise(ledger, configuration, roster.layout, targets)
        metrics.write_json(summary, self._folder / "summary.json")
        return summary

    def _begin(self, ledger: Ledger, roster: Roster) -> None:
        """Write the genesis entry, or check that the nodes still hold the run's base model."""
        genesis = ledger.last("genesis")
        if genesis is None:
            ledger.append(
                "genesis",
                0,
                {
                    "run": self._configuration.run_id(),
                    "configuration": self._configuration.identity(),
                    "base_model": self._configuration.base_model,
                    "base_digest": roster.base_digest,
                    "layout": roster.layout.fingerprint,
                    "layout_blob": ledger.put(roster.layout_json.encode()),
                },
                {"started": time.time()},
            )
        elif genesis.content["base_digest"] != roster.base_digest:
            raise LedgerError(
                f"the run began with base model {genesis.content['base_digest'][:12]}, the nodes now"
                f" hold {roster.base_digest[:12]}: restore the first model, or start a new run"
            )

    def _announce(self, roster: Roster, first_round: int) -> None:
        configuration = self._configuration
        self._emit(
            events.RunStarted(
                name=configuration.name,
                preset=configuration.preset,
                rounds=configuration.rounds,
                first_round=first_round,
                nodes=tuple(self._node_info(member, roster) for member in roster.members),
                base_model=configuration.base_model,
                output=str(self._folder),
            )
        )

    def _node_info(self, member: Member, roster: Roster) -> events.NodeInfo:
        node = self._configuration.node(member.capabilities.node)
        method = make_method(
            self._configuration, member.capabilities, round_number=1, layout=roster.layout
        )
        categories = ", ".join(node.categories or ()) if node else ""
        return events.NodeInfo(
            node=member.capabilities.node,
            sends=method.label,
            examples=member.capabilities.examples,
            held_out=member.capabilities.held_out,
            description=(node.description if node else "") or categories,
        )

    def _round(
        self, number: int, model: GlobalModel, ledger: Ledger, roster: Roster
    ) -> GlobalModel:
        self._emit(events.RoundStarted(number))
        started, monotonic = time.time(), time.monotonic()
        outcomes = self._collect(number, "train", model, roster, ledger)
        accepted = [o for o in outcomes if o.verdict is Verdict.ACCEPTED]
        updates = [o for o in accepted if o.admitted is not None and o.admitted.update is not None]
        quorum = len(updates) >= self._configuration.minimum_updates()
        following = self._fold(model, updates) if quorum else model
        if not quorum:
            self._emit(
                events.Notice(
                    "warning",
                    f"round {number}: {len(updates)} updates accepted,"
                    f" {self._configuration.minimum_updates()} needed; the model stays as it was",
                )
            )
        state = ledger.put(following.to_bytes())
        entering = sum_evaluations(accepted)
        head = following.common_view(self._preset, *self._view_limits())
        content = {
            "quorum": quorum,
            "entering": entering,
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
            "nodes": _seconds(outcomes),
        }
        previous_state = _state_before(ledger)
        entry = ledger.append("round", number, content, wall)
        ledger.keep_states({state, previous_state} - {""})
        self._report(entry, entering)
        return following

    def _fold(self, model: GlobalModel, accepted: list[Outcome]) -> GlobalModel:
        weighted = []
        for outcome in accepted:
            assert outcome.admitted is not None
            assert outcome.admitted.update is not None
            weighted.append((outcome.admitted.update, examples(outcome)))
        following, shares = next_model(model, weighted, self._configuration)
        for outcome, share in zip(accepted, shares, strict=True):
            outcome.share = share
        return following

    def _final_evaluation(self, model: GlobalModel, ledger: Ledger, roster: Roster) -> None:
        """Ask every node for the loss of the model that the last round produced."""
        number = self._configuration.rounds + 1
        started = time.time()
        self._emit(events.Notice("info", "final evaluation of the global model on every node"))
        outcomes = self._collect(number, "evaluate", model, roster, ledger)
        entering = sum_evaluations([o for o in outcomes if o.verdict is Verdict.ACCEPTED])
        content = {"entering": entering, "nodes": [row(outcome) for outcome in outcomes]}
        wall = {
            "started": started,
            "seconds": time.time() - started,
            "nodes": _seconds(outcomes),
        }
        ledger.append("evaluation", self._configuration.rounds, content, wall)
        self._emit_evaluation(self._configuration.rounds, entering)

    def _contributions(self, ledger: Ledger, roster: Roster) -> None:
        """Ask for the loss of the model without each family; recorded as "ablation" entries."""
        configuration = self._configuration
        families = sorted(metrics.families(ledger))
        done = {
            entry.content["without"]
            for entry in ledger.entries(metrics.ABLATION)
            if entry.round == configuration.rounds
        }
        if len(families) < 2:
            return
        for place, family in enumerate(families):
            if family in done:
                continue
            words = family.replace("_", " ")
            self._emit(events.Notice("info", f"evaluation of the model without {words} updates"))
            started = time.time()
            model = without(ledger, configuration, family)
            number = configuration.rounds + 2 + place
            outcomes = self._collect(number, "evaluate", model, roster, ledger)
            entering = sum_evaluations([o for o in outcomes if o.verdict is Verdict.ACCEPTED])
            content = {
                "without": family,
                "entering": entering,
                "nodes": [row(outcome) for outcome in outcomes],
            }
            wall = {
                "started": started,
                "seconds": time.time() - started,
                "nodes": _seconds(outcomes),
            }
            ledger.append(metrics.ABLATION, configuration.rounds, content, wall)

    def _collect(
        self, number: int, action: str, model: GlobalModel, roster: Roster, ledger: Ledger
    ) -> list[Outcome]:
        """Send every member its plan and turn each reply, or its absence, into an outcome."""
        members = {member.node_id: member for member in roster.members}
        basis = model.basis or first_basis(self._configuration, roster.layout)
        plans: dict[int, Plan] = {}
        payloads: dict[int, bytes] = {}
        digests: dict[int, str] = {}
        for node_id, member in members.items():
            plan = make_plan(
                self._configuration,
                member.capabilities,
                round_number=number,
                layout=roster.layout,
                base_digest=roster.base_digest,
                action=action,
                sums=model.sums,
            )
            view = self._view(model, plan, basis)
            plans[node_id] = plan
            digests[node_id] = view.as_sent(self._configuration.view_dtype).digest()
            payloads[node_id] = encode_plan(plan, view, self._configuration.view_dtype)
        answered: dict[int, Outcome] = {}
        others: list[Outcome] = []
        kind = TRAIN if action == "train" else EVALUATE
        deadline = self._configuration.deadline_seconds
        for reply in self._exchange.ask(payloads, kind, number, deadline):
            plan = plans[reply.node_id]
            context = self._context(roster.layout, plan, digests[reply.node_id], basis)
            outcome = judge(reply, context, self._seen)
            if outcome.admitted is not None and reply.payload is not None:
                outcome.blob = ledger.put(reply.payload)
            if reply.late or reply.node_id in answered:
                others.append(outcome)
            else:
                outcome.bytes_down = len(payloads[reply.node_id])
                answered[reply.node_id] = outcome
            self._tell(outcome, number)
        for node_id, plan in plans.items():
            if node_id not in answered:
                missing = Outcome(
                    plan, Verdict.MISSING, f"no reply within {deadline:g} s", round=number
                )
                missing.bytes_down = len(payloads[node_id])
                answered[node_id] = missing
                self._tell(missing, number)
        for outcome in answered.values():
            outcome.memory_bytes = memory_bytes(outcome.plan, roster.layout)
        in_order = sorted(answered.values(), key=lambda outcome: outcome.plan.node)
        for diverged in unlike_weights(in_order):
            self._emit(events.Notice("warning", f"round {number}: {diverged}"))
        return in_order + sorted(others, key=lambda outcome: (outcome.plan.node, outcome.reason))

    def _context(self, layout: Layout, plan: Plan, view: str, basis: Basis | None) -> GateContext:
        return GateContext(
            layout=layout,
            plan=plan,
            seen_nonces=frozenset(self._seen),
            max_bytes=self._configuration.max_update_bytes,
            max_examples=self._configuration.max_examples,
            view=view,
            basis=basis,
        )

    def _tell(self, outcome: Outcome, number: int) -> None:
        """Announce a reply of a round; of the final evaluation only what went wrong."""
        if outcome.plan.action == "train":
            self._emit(replied(outcome, number))
        elif outcome.verdict is not Verdict.ACCEPTED:
            text = f"final evaluation: {outcome.plan.node}: {outcome.reason}"
            self._emit(events.Notice("warning", text))

    def _view(self, model: GlobalModel, plan: Plan, basis: Basis | None) -> View:
        if plan.action == "evaluate" or not isinstance(plan.method, LoraMethod):
            view = model.common_view(self._preset, *self._view_limits())
            wanted = plan.action == "train" and isinstance(plan.method, SketchMethod)
            return replace(view, basis=basis) if wanted else view
        return model.view(self._preset, plan.method.rank, *self._view_limits())

    def _view_limits(self) -> tuple[int | None, float | None]:
        return self._configuration.view_rank, self._configuration.view_energy

    def _tail_energy(self, model: GlobalModel) -> float:
        if self._preset.view == "whole":
            return 0.0
        return model.carry.tail_energy(*self._view_limits())

    def _report(self, entry: Entry, entering: dict[str, Any] | None) -> None:
        self._emit_evaluation(entry.round - 1, entering)
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
            )
        )

    def _emit_evaluation(self, round_number: int, entering: dict[str, Any] | None) -> None:
        scores = metrics.scores(entering)
        if scores is not None:
            self._emit(
                events.EvaluationDone(
                    round=round_number,
                    loss=scores["loss"],
                    perplexity=scores["perplexity"],
                    accuracy=scores["accuracy"],
                    tokens=scores["tokens"],
                )
            )


def _seconds(outcomes: list[Outcome]) -> dict[str, float | None]:
    """By node; of a node that answered twice the first answer's, and the first is in the list first."""
    return {outcome.plan.node: outcome.seconds for outcome in reversed(outcomes)}


def _state_before(ledger: Ledger) -> str:
    last = ledger.last("round")
    return "" if last is None else str(last.content["state"])


def _evaluated(ledger: Ledger, round_number: int) -> bool:
    return any(entry.round == round_number for entry in ledger.entries("evaluation"))
