"""Replaying a ledger: do every round's aggregation again from its blobs and compare the digests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aggregators import LowRank, UpdateRejected
from aggregators.gate import GateContext, admit
from aggregators.messages import Plan
from aggregators.presets import PRESETS
from fedserver.configuration import RunConfiguration
from fedserver.export import read_layout
from fedserver.global_model import GlobalModel, next_model
from fedserver.ledger import Ledger, LedgerError
from fedserver.planner import largest_rank


@dataclass(frozen=True)
class Replayed:
    """One round: the digest that the ledger names and the one that replaying gave."""

    round: int
    updates: int
    expected: str
    found: str

    @property
    def equal(self) -> bool:
        """Whether the replayed state has the recorded bytes."""
        return self.expected == self.found


def replay(
    ledger: Ledger,
    configuration: RunConfiguration,
    tell: Callable[[Replayed], None] = lambda replayed: None,
) -> list[Replayed]:
    """Fold all accepted updates, through the gate again, from the base to the last round."""
    layout = read_layout(ledger)
    preset = PRESETS[configuration.preset]
    model = GlobalModel.empty(layout)
    replayed = []
    for entry in ledger.entries("round"):
        updates: list[tuple[LowRank, int]] = []
        for node in entry.content["nodes"]:
            if node["verdict"] != "accepted":
                continue
            context = GateContext(
                layout=layout,
                plan=Plan.model_validate(node["plan"]),
                seen_nonces=frozenset(),
                max_bytes=configuration.max_update_bytes,
                max_examples=configuration.max_examples,
            )
            try:
                admitted = admit(ledger.get(node["update"]), context)
            except UpdateRejected as rejection:
                raise LedgerError(
                    f"round {entry.round}: the recorded update of {node['node']!r} no longer"
                    f" passes the gate: {rejection}"
                ) from None
            assert isinstance(admitted.update, LowRank)
            updates.append((admitted.update, admitted.report.examples))
        if entry.content["quorum"]:
            model = next_model(
                model,
                updates,
                preset,
                server_learning_rate=configuration.server_learning_rate,
                largest_rank=largest_rank(configuration),
            )
        result = Replayed(entry.round, len(updates), entry.content["state"], model.digest())
        replayed.append(result)
        tell(result)
    return replayed
