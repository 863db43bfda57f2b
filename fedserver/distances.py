"""How far each node's update of a round lies from its family's mean: a view of the ledger, on demand.

Floating-point sums differ between machines, so none of this is content of a ledger, nor of its metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from aggregators.cohort import Cohort
from aggregators.distances import Member, distances, over_median
from aggregators.gate import Admitted
from aggregators.pair import parts_of
from fedserver.configuration import RunConfiguration
from fedserver.entry import Entry
from fedserver.ledger import Ledger, LedgerError
from fedserver.replay import accepted_updates, admit_again, basis_of
from fedserver.run_folder import read_layout
from fedserver.staleness import discounted

READ, COMPARED = "updates read", "tensors compared"
"""What ``measure`` tells of, with how many are done, and of how many."""


@dataclass(frozen=True)
class Measured:
    """One node's update of one family; a node that trains in two ways has two.

    ``share`` of the family's mean; ``norm``, ``distance`` from that mean and ``cosine`` to the mean of
    the others as ``aggregators.distances`` has them; ``over_median``: the distance over the median of
    the family's distances. ``edge``: it is the mean of devices behind an edge aggregator, of whose own
    updates the ledger has digests alone.
    """

    node: str
    family: str
    share: float
    norm: float
    distance: float
    over_median: float | None
    cosine: float | None
    edge: bool


def measure(
    ledger: Ledger,
    configuration: RunConfiguration,
    number: int | None = None,
    tell: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> tuple[Entry, list[Measured]]:
    """The entry of round ``number`` (default: the newest), and its accepted updates, by family and node.

    Updates are taken as they entered the mean: late ones times their discount. The chain is checked, and
    the round's blobs and signatures, and every reply passes the gate again.

    Raises LedgerError: the round is not in the ledger, accepted no update, or is not sound; or its
    updates are not kept any more.
    """
    entry = ledger.last("round") if number is None else ledger.round(number)
    if entry is None:
        raise LedgerError(
            f"{ledger.folder}: "
            + (
                "no round was committed"
                if number is None
                else f"round {number} is not in the ledger"
            )
        )
    rows = accepted_updates(entry)
    if not rows:
        raise LedgerError(f"{ledger.folder}: round {entry.round} accepted no update to be measured")
    _check(ledger, entry, rows)
    torch.set_num_threads(configuration.threads)
    layout, basis = read_layout(ledger), basis_of(ledger, configuration, entry)
    families: dict[str, list[tuple[str, Member]]] = {}
    for done, row in enumerate(rows):
        tell(READ, done, len(rows))
        admitted = admit_again(ledger, configuration, entry, row, layout, basis)
        for member in _members(admitted, row.get("discount", 1.0)):
            families.setdefault(member.update.family, []).append((row["node"], member))
    tell(READ, len(rows), len(rows))
    edges = {row["node"] for row in rows if "members" in row}
    measured = []
    for family, members in sorted(families.items()):
        try:
            found = distances(
                [member for _, member in members],
                layout,
                lambda done, of: tell(COMPARED, done, of),
            )
        except ValueError as error:
            raise LedgerError(f"round {entry.round}: {family}: {error}") from None
        whole = math.fsum(member.weight for _, member in members)
        for (node, member), one, ratio in zip(members, found, over_median(found), strict=True):
            measured.append(
                Measured(
                    node,
                    family,
                    member.weight / whole,
                    one.norm,
                    one.distance,
                    ratio,
                    one.cosine,
                    node in edges,
                )
            )
    return entry, measured


def _check(ledger: Ledger, entry: Entry, rows: list[dict[str, Any]]) -> None:
    gone = [row["node"] for row in rows if not ledger.has(row["update"])]
    if gone:
        others = f" and {len(gone) - 3} others" if len(gone) > 3 else ""
        raise LedgerError(
            f"{ledger.folder}: round {entry.round} cannot be measured: the updates of"
            f" {', '.join(gone[:3])}{others} are not kept in {ledger.blobs.folder} any more; restore"
            " them from a backup"
        )
    if problems := ledger.verify(state=False, only=entry.round):
        more = f" (and {len(problems) - 1} more: fedbraid ledger verify)" if problems[1:] else ""
        raise LedgerError(
            f"{ledger.folder} is not sound, so it is not measured: {problems[0]}{more}"
        )


def _members(admitted: Admitted, discount: float) -> list[Member]:
    """What a reply adds to the mean of each of its families; of an edge the mean of its devices."""
    update, weight = admitted.update, admitted.report.examples
    assert update is not None
    if isinstance(update, Cohort):
        return [Member(total.mean(), total.weight, total.held) for total in update.totals]
    return [Member(part, weight) for part in parts_of(discounted(update, discount))]
