"""Replaying a ledger: do every round's aggregation again from its blobs and compare the digests.

A state is a checkpoint: it follows from the updates before it, so one that was lost is made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from aggregators import Basis, Layout, Sketch, Update, UpdateRejected
from aggregators.cohort import Cohort
from aggregators.gate import Admitted, GateContext, admit
from aggregators.messages import Plan
from fedserver.configuration import RunConfiguration
from fedserver.control import OPERATOR
from fedserver.global_model import GlobalModel, first_basis, next_model
from fedserver.ledger import Entry, Ledger, LedgerError
from fedserver.model_line import rolled_back_to
from fedserver.run_folder import check_rules, read_layout
from fedserver.staleness import discounted


@dataclass(frozen=True)
class Replayed:
    """One round: the digest that the ledger names and the one that replaying gave.

    ``rolled_back_to``: the entry is not a round but an operator's roll-back to that round, before
    round ``round``.
    """

    round: int
    updates: int
    expected: str
    found: str
    rolled_back_to: int | None = None

    @property
    def equal(self) -> bool:
        """Whether the replayed state has the recorded bytes."""
        return self.expected == self.found


def restore(ledger: Ledger, configuration: RunConfiguration) -> tuple[GlobalModel, int]:
    """The state after the last committed round, and that round's number (0: none yet).

    A state blob that is lost or damaged is made again from the updates, and stored.
    """
    layout = read_layout(ledger)
    last = ledger.last("round")
    if last is None:
        return GlobalModel.empty(layout), 0
    state = last_state(ledger)
    try:
        return GlobalModel.from_bytes(ledger.get(state), layout), last.round
    except LedgerError:
        ledger.forget(state)
    for replayed, model in states(ledger, configuration):
        if not replayed.equal:
            raise LedgerError(
                f"{ledger.folder}: the state of round {replayed.round} cannot be made again from the"
                " recorded updates; restore the folder from a copy"
            )
        made = model
    ledger.put(made.to_bytes())
    return made, last.round


def last_state(ledger: Ledger, before: Entry | None = None) -> str:
    """Digest of the state that the next round starts from, or that the round of ``before`` started from;
    "" before the first round."""
    last = ledger.last("round") if before is None else ledger.round(before.round - 1)
    if last is None:
        return ""
    state, end = str(last.content["state"]), math.inf if before is None else before.height
    for entry in ledger.entries(OPERATOR, last.height):
        if entry.height < end and rolled_back_to(entry) is not None:
            state = str(entry.content["state"])
    return state


def basis_of(ledger: Ledger, configuration: RunConfiguration, entry: Entry) -> Basis | None:
    """What a round's sketches were seen through: that of the state that it began with; None without any.

    States are kept of the last rounds alone; an earlier one is made again from the updates.
    """
    if not any(_sketches(row["plan"]["method"]) for row in accepted_updates(entry)):
        return None
    layout = read_layout(ledger)
    model, state = GlobalModel.empty(layout), last_state(ledger, entry)
    if state:
        try:
            model = GlobalModel.from_bytes(ledger.get(state), layout)
        except LedgerError:
            for replayed, following in states(ledger, configuration):
                if replayed.round == entry.round and replayed.rolled_back_to is None:
                    break
                model = following
    return model.basis or first_basis(configuration, layout)


def accepted_updates(entry: Entry) -> list[dict[str, Any]]:
    """The rows of a round's nodes whose updates are in it."""
    return [
        row
        for row in entry.content["nodes"]
        if row["verdict"] == "accepted" and row["plan"]["action"] == "train"
    ]


def admit_again(
    ledger: Ledger,
    configuration: RunConfiguration,
    entry: Entry,
    row: dict[str, Any],
    layout: Layout,
    basis: Basis | None,
) -> Admitted:
    """The recorded reply of a node's row, through the gate again.

    Raises LedgerError: its blob is lost or was changed, or the gate refuses it.
    """
    context = GateContext(
        layout=layout,
        plan=Plan.model_validate(row["plan"]),
        seen_nonces=frozenset(),
        max_bytes=configuration.max_update_bytes,
        max_examples=configuration.max_examples,
        basis=basis,
    )
    try:
        return admit(ledger.get(row["update"]), context)
    except UpdateRejected as rejection:
        raise LedgerError(
            f"round {entry.round}: the recorded update of {row['node']!r} no longer passes the"
            f" gate: {rejection}"
        ) from None


def model_of_round(ledger: Ledger, configuration: RunConfiguration, number: int) -> GlobalModel:
    """The model after a committed round, whatever came later: its state where the ledger keeps it.

    Raises LedgerError: the round was not committed.
    """
    entry = ledger.round(number)
    if entry is None:
        raise LedgerError(f"{ledger.folder}: round {number} is not in the ledger")
    try:
        return GlobalModel.from_bytes(ledger.get(entry.content["state"]), read_layout(ledger))
    except LedgerError:
        return model_after(ledger, configuration, number)


def model_after(ledger: Ledger, configuration: RunConfiguration, number: int) -> GlobalModel:
    """The model as it was after round ``number``, from the recorded updates; 0: no change at all."""
    if number == 0:
        return GlobalModel.empty(read_layout(ledger))
    for replayed, model in states(ledger, configuration):
        if replayed.round == number and replayed.rolled_back_to is None:
            return model
    raise LedgerError(f"{ledger.folder}: round {number} is not in the ledger")


def replay(
    ledger: Ledger,
    configuration: RunConfiguration,
    tell: Callable[[Replayed], None] = lambda replayed: None,
    *,
    last: int | None = None,
) -> list[Replayed]:
    """Fold all accepted updates, through the gate again, from the base to the ``last`` round.

    Raises LedgerError: the ledger has no such round.
    """
    replayed = []
    for result, _ in states(ledger, configuration):
        replayed.append(result)
        tell(result)
        if result.round == last and result.rolled_back_to is None:
            return replayed
    if last is not None:
        raise LedgerError(f"{ledger.folder}: round {last} is not in the ledger")
    return replayed


def without(ledger: Ledger, configuration: RunConfiguration, family: str) -> GlobalModel:
    """The last model as it would be if no update of one family had been added."""
    model = GlobalModel.empty(read_layout(ledger))
    for _, following in states(ledger, configuration, skipped=family):
        model = following
    return model


def states(
    ledger: Ledger, configuration: RunConfiguration, skipped: str | None = None
) -> Iterator[tuple[Replayed, GlobalModel]]:
    """The model after every round, made from the recorded updates alone.

    ``skipped``: a family whose updates are left out. Raises LedgerError: other rules made the run.
    """
    check_rules(ledger)
    layout = read_layout(ledger)
    model = GlobalModel.empty(layout)
    # The order of floating-point sums depends on the number of threads.
    torch.set_num_threads(configuration.threads)
    targets = {rolled_back_to(entry) for entry in ledger.entries(OPERATOR)} - {None}
    kept = {0: model} if 0 in targets else {}
    for entry in ledger.entries():
        target = rolled_back_to(entry)
        if target is not None:
            model = kept[target]
            digest = model.digest()
            yield Replayed(entry.round, 0, entry.content["state"], digest, target), model
        if entry.kind != "round":
            continue
        updates: list[tuple[Update | Cohort, int]] = []
        basis = model.basis or first_basis(configuration, layout)
        for node in accepted_updates(entry):
            if node["plan"]["method"]["family"] == skipped:
                continue
            admitted = admit_again(ledger, configuration, entry, node, layout, basis)
            update = admitted.update
            if isinstance(update, Cohort) and skipped is not None:
                update = update.without(skipped)
            if update is not None:
                counted = discounted(update, node.get("discount", 1.0))
                updates.append((counted, admitted.report.examples))
        if entry.content["quorum"] and updates:
            model, _ = next_model(model, updates, configuration)
        if entry.round in targets:
            kept[entry.round] = model
        yield Replayed(entry.round, len(updates), entry.content["state"], model.digest()), model


def _sketches(method: dict[str, Any]) -> bool:
    """Whether a plan's method, or one of those of an edge's devices, asks for sketches."""
    groups = method.get("groups", ())
    return method["family"] == Sketch.family or any(_sketches(one["method"]) for one in groups)
