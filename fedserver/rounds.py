"""The round loop: plan, send, gate, aggregate, commit. It survives whatever a node replies."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aggregators import Layout, LowRank, UpdateRejected, Verdict
from aggregators.gate import Admitted, GateContext, admit
from aggregators.messages import Evaluation, Plan, encode_plan
from aggregators.presets import PRESETS
from fedserver import events, metrics
from fedserver.configuration import RunConfiguration, to_toml
from fedserver.exchange import EVALUATE, TRAIN, Exchange, Reply
from fedserver.global_model import GlobalModel, next_model
from fedserver.ledger import Entry, Ledger, LedgerError
from fedserver.planner import check_ranks, largest_rank, make_plan
from fedserver.roster import Member, Roster, gather_roster


@dataclass
class _Outcome:
    """What one node's reply came to; becomes a row of the round's ledger entry."""

    plan: Plan
    verdict: Verdict
    reason: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    admitted: Admitted | None = None
    blob: str | None = None
    round: int = 0
    share: float = field(default=0.0)


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
        targets = check_ranks(self._configuration, roster.layout)
        ledger = existing or Ledger(self._folder, create=True)
        try:
            return self._run(ledger, roster, targets)
        finally:
            ledger.close()

    def _run(self, ledger: Ledger, roster: Roster, targets: list[str]) -> dict[str, Any]:
        configuration = self._configuration
        (self._folder / "scenario.toml").write_text(to_toml(configuration), encoding="utf-8")
        self._begin(ledger, roster)
        model, done = restore(ledger, roster.layout)
        self._announce(roster, done + 1)
        for number in range(done + 1, configuration.rounds + 1):
            model = self._round(number, model, ledger, roster)
            metrics.write(ledger, self._folder / "metrics.jsonl")
        if configuration.evaluate and not _evaluated(ledger, configuration.rounds):
            self._final_evaluation(model, ledger, roster)
        metrics.write(ledger, self._folder / "metrics.jsonl")
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
                nodes=tuple(self._node_info(member) for member in roster.members),
                base_model=configuration.base_model,
                output=str(self._folder),
            )
        )

    def _node_info(self, member: Member) -> events.NodeInfo:
        node = self._configuration.node(member.capabilities.node)
        rank = (node.lora_r if node else None) or self._configuration.lora_r
        categories = ", ".join(node.categories or ()) if node else ""
        return events.NodeInfo(
            node=member.capabilities.node,
            rank=rank,
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
        quorum = len(accepted) >= self._configuration.minimum_updates()
        following = self._fold(model, accepted) if quorum else model
        if not quorum:
            self._emit(
                events.Notice(
                    "warning",
                    f"round {number}: {len(accepted)} updates accepted,"
                    f" {self._configuration.minimum_updates()} needed; the model stays as it was",
                )
            )
        state = ledger.put(following.to_bytes())
        entering = _sum_evaluations(accepted)
        head = following.common_view(self._preset, *self._view_limits())
        content = {
            "quorum": quorum,
            "entering": entering,
            "nodes": [_row(outcome) for outcome in outcomes],
            "state": state,
            "carry_rank": following.carry.rank,
            "view_rank": max(head.ranks.values(), default=0),
            "tail_energy": self._tail_energy(following),
        }
        wall = {
            "started": started,
            "seconds": time.monotonic() - monotonic,
            "nodes": {o.plan.node: o.seconds for o in outcomes},
        }
        previous_state = _state_before(ledger)
        entry = ledger.append("round", number, content, wall)
        ledger.keep_states({state, previous_state} - {""})
        self._report(entry, entering)
        return following

    def _fold(self, model: GlobalModel, accepted: list[_Outcome]) -> GlobalModel:
        weighted = []
        total = sum(_examples(outcome) for outcome in accepted)
        for outcome in accepted:
            assert outcome.admitted is not None
            assert isinstance(outcome.admitted.update, LowRank)
            weighted.append((outcome.admitted.update, _examples(outcome)))
            outcome.share = _examples(outcome) / total
        return next_model(
            model,
            weighted,
            self._preset,
            server_learning_rate=self._configuration.server_learning_rate,
            largest_rank=largest_rank(self._configuration),
        )

    def _final_evaluation(self, model: GlobalModel, ledger: Ledger, roster: Roster) -> None:
        """Ask every node for the loss of the model that the last round produced."""
        number = self._configuration.rounds + 1
        started = time.time()
        self._emit(events.Notice("info", "final evaluation of the global model on every node"))
        outcomes = self._collect(number, "evaluate", model, roster, ledger)
        entering = _sum_evaluations([o for o in outcomes if o.verdict is Verdict.ACCEPTED])
        content = {"entering": entering, "nodes": [_row(outcome) for outcome in outcomes]}
        wall = {"started": started, "nodes": {o.plan.node: o.seconds for o in outcomes}}
        ledger.append("evaluation", self._configuration.rounds, content, wall)
        self._emit_evaluation(self._configuration.rounds, entering)

    def _collect(
        self, number: int, action: str, model: GlobalModel, roster: Roster, ledger: Ledger
    ) -> list[_Outcome]:
        """Send every member its plan and turn each reply, or its absence, into an outcome."""
        members = {member.node_id: member for member in roster.members}
        plans: dict[int, Plan] = {}
        payloads: dict[int, bytes] = {}
        for node_id, member in members.items():
            plan = make_plan(
                self._configuration,
                member.capabilities,
                round_number=number,
                layout=roster.layout.fingerprint,
                base_digest=roster.base_digest,
                action=action,
            )
            view = self._view(model, plan)
            plans[node_id] = plan
            payloads[node_id] = encode_plan(plan, view, self._configuration.view_dtype)
        answered: dict[int, _Outcome] = {}
        others: list[_Outcome] = []
        kind = TRAIN if action == "train" else EVALUATE
        deadline = self._configuration.deadline_seconds
        for reply in self._exchange.ask(payloads, kind, number, deadline):
            outcome = self._judge(reply, plans[reply.node_id], roster.layout, ledger)
            if reply.late or reply.node_id in answered:
                others.append(outcome)
            else:
                outcome.bytes_down = len(payloads[reply.node_id])
                answered[reply.node_id] = outcome
            self._tell(outcome, number)
        for node_id, plan in plans.items():
            if node_id not in answered:
                missing = _Outcome(
                    plan, Verdict.MISSING, f"no reply within {deadline:g} s", round=number
                )
                missing.bytes_down = len(payloads[node_id])
                answered[node_id] = missing
                self._tell(missing, number)
        in_order = sorted(answered.values(), key=lambda outcome: outcome.plan.node)
        return in_order + sorted(others, key=lambda outcome: (outcome.plan.node, outcome.reason))

    def _tell(self, outcome: _Outcome, number: int) -> None:
        """Announce a reply of a round; of the final evaluation only what went wrong."""
        if outcome.plan.action == "train":
            self._emit(_replied(outcome, number))
        elif outcome.verdict is not Verdict.ACCEPTED:
            text = f"final evaluation: {outcome.plan.node}: {outcome.reason}"
            self._emit(events.Notice("warning", text))

    def _view(self, model: GlobalModel, plan: Plan) -> LowRank | None:
        if plan.action == "evaluate":
            view = model.common_view(self._preset, *self._view_limits())
        else:
            view = model.view(self._preset, plan.rank, *self._view_limits())
        return view if view.factors else None

    def _view_limits(self) -> tuple[int | None, float | None]:
        return self._configuration.view_rank, self._configuration.view_energy

    def _tail_energy(self, model: GlobalModel) -> float:
        if self._preset.view == "whole":
            return 0.0
        return model.carry.tail_energy(*self._view_limits())

    def _judge(self, reply: Reply, plan: Plan, layout: Layout, ledger: Ledger) -> _Outcome:
        """Pass a reply through the gate. Every way that it can be wrong ends in a verdict."""
        outcome = _Outcome(
            plan,
            Verdict.ACCEPTED,
            bytes_up=len(reply.payload or b""),
            seconds=reply.seconds,
            round=reply.round,
        )
        if reply.payload is None:
            outcome.verdict, outcome.reason = Verdict.FAILED, reply.error
            return outcome
        if reply.late:
            outcome.verdict = Verdict.LATE
            outcome.reason = f"answers round {reply.round} after its deadline"
            return outcome
        context = GateContext(
            layout=layout,
            plan=plan,
            seen_nonces=frozenset(self._seen),
            max_bytes=self._configuration.max_update_bytes,
            max_examples=self._configuration.max_examples,
        )
        try:
            outcome.admitted = admit(reply.payload, context)
        except UpdateRejected as rejection:
            outcome.verdict, outcome.reason = rejection.verdict, rejection.detail
            return outcome
        self._seen.add(plan.nonce)
        outcome.blob = ledger.put(reply.payload)
        return outcome

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


def open_existing(folder: Path, configuration: RunConfiguration, *, resume: bool) -> Ledger | None:
    """The ledger to continue, None for a fresh folder; refuses a folder that is another run's."""
    if not (folder / "ledger.db").is_file():
        if resume and not folder.exists():
            raise LedgerError(f"there is nothing to resume in {folder}")
        if folder.is_dir() and any(folder.iterdir()) and not resume:
            raise LedgerError(f"{folder} is not empty and holds no run; choose another --output")
        return None
    ledger = Ledger(folder)
    genesis = ledger.last("genesis")
    if genesis is not None and genesis.content["run"] != configuration.run_id():
        differing = [
            key
            for key, value in configuration.identity().items()
            if genesis.content["configuration"].get(key) != value
        ]
        ledger.close()
        raise LedgerError(
            f"{folder} holds another run (different {', '.join(differing) or 'scenario'});"
            " choose another --output"
        )
    if genesis is not None and not resume:
        ledger.close()
        raise LedgerError(f"{folder} already holds this run; continue it with --resume")
    return ledger


def restore(ledger: Ledger, layout: Layout) -> tuple[GlobalModel, int]:
    """The state after the last committed round, and that round's number (0: none yet)."""
    last = ledger.last("round")
    if last is None:
        return GlobalModel.empty(layout), 0
    return GlobalModel.from_bytes(ledger.get(last.content["state"]), layout), last.round


def _state_before(ledger: Ledger) -> str:
    last = ledger.last("round")
    return "" if last is None else str(last.content["state"])


def _evaluated(ledger: Ledger, round_number: int) -> bool:
    return any(entry.round == round_number for entry in ledger.entries("evaluation"))


def _examples(outcome: _Outcome) -> int:
    assert outcome.admitted is not None
    return outcome.admitted.report.examples


def _sum_evaluations(outcomes: list[_Outcome]) -> dict[str, Any] | None:
    """Token sums over all nodes' held-out data, added in the order of the nodes' names."""
    found = [o.admitted.report.evaluation for o in outcomes if o.admitted is not None]
    evaluations: list[Evaluation] = [e for e in found if e is not None and e.tokens > 0]
    if not evaluations:
        return None
    return {
        "loss_sum": sum(e.loss_sum for e in evaluations),
        "tokens": sum(e.tokens for e in evaluations),
        "correct": sum(e.correct for e in evaluations),
        "examples": sum(e.examples for e in evaluations),
    }


def _row(outcome: _Outcome) -> dict[str, Any]:
    admitted = outcome.admitted
    row: dict[str, Any] = {
        "node": outcome.plan.node,
        "round": outcome.round,
        "plan": outcome.plan.model_dump(mode="json", exclude={"data"}),
        "verdict": outcome.verdict.value,
        "reason": outcome.reason,
        "bytes_up": outcome.bytes_up,
        "bytes_down": outcome.bytes_down,
        "update": outcome.blob,
        "share": outcome.share,
    }
    if admitted is not None:
        row |= {"report": admitted.report.model_dump(mode="json")}
        if admitted.update is not None:
            row |= {"norm": admitted.update.squared_norm() ** 0.5, "family": admitted.update.family}
    return row


def _replied(outcome: _Outcome, number: int) -> events.NodeReplied:
    report = outcome.admitted.report if outcome.admitted is not None else None
    return events.NodeReplied(
        round=number,
        node=outcome.plan.node,
        verdict=outcome.verdict.value,
        reason=outcome.reason,
        rank=outcome.plan.rank,
        train_loss_first=report.train_loss_first if report else None,
        train_loss=report.train_loss if report else None,
        bytes_up=outcome.bytes_up,
        bytes_down=outcome.bytes_down,
        seconds=outcome.seconds,
    )
