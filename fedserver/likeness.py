"""How alike the changes of a round's nodes are, whatever their families: a view of the ledger.

Updates of unlike families meet as coordinates along one pool of probes (``aggregators.coordinates``).
The pool is seeded by the entry's hash, which nobody knew when the updates were made, so that none can
have been made to look like another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aggregators import Basis, Sketch, Update, coordinates
from aggregators.cohort import Cohort
from aggregators.coordinates import Change, vector
from aggregators.gate import GateContext, admit
from aggregators.messages import Plan
from aggregators.methods import SketchMethod
from aggregators.pair import parts_of
from fedserver.configuration import RunConfiguration
from fedserver.entry import Entry
from fedserver.global_model import first_basis
from fedserver.ledger import Ledger, LedgerError
from fedserver.replay import states
from fedserver.run_folder import read_layout

PROBES = 1024


@dataclass(frozen=True)
class Likeness:
    """``cosines`` [N, N] between the changes of ``nodes``, each off by about ``error``; ``lengths`` [N].

    A node that found nothing to change has the length 0, and the cosine 0 with all.
    """

    nodes: tuple[str, ...]
    families: tuple[str, ...]
    lengths: Tensor
    cosines: Tensor
    error: float


def likeness(
    ledger: Ledger, configuration: RunConfiguration, number: int, probes: int = PROBES
) -> Likeness:
    """Of the accepted updates of round ``number``, in the order of its entry.

    Raises LedgerError where the round is not in the ledger, or accepted nothing.
    """
    entry = next((e for e in ledger.entries("round") if e.round == number), None)
    if entry is None:
        raise LedgerError(f"{ledger.folder}: round {number} is not in the ledger")
    rows = [
        (row, Plan.model_validate(row["plan"]))
        for row in entry.content["nodes"]
        if row["verdict"] == "accepted" and row["plan"]["action"] == "train"
    ]
    if not rows:
        raise LedgerError(f"{ledger.folder}: round {number} accepted no update")
    layout = read_layout(ledger)
    sketched = any(isinstance(plan.method, SketchMethod) for _, plan in rows)
    basis = _basis_of(ledger, configuration, entry) if sketched else None
    vectors = []
    for row, plan in rows:
        context = GateContext(layout, plan, max_bytes=configuration.max_update_bytes, basis=basis)
        update = admit(ledger.get(row["update"]), context).update
        assert update is not None
        if isinstance(update, Cohort):
            raise LedgerError(
                f"{row['node']} is an edge: its sum is no one node's change; run the scenario without"
                " edges to compare its devices"
            )
        within = configuration.projected.within
        vectors.append(_vector(update, basis, within, int(entry.hash[:15], 16), probes))
    found = torch.stack(vectors)
    products = found @ found.T / probes
    lengths = products.diagonal().sqrt()
    safe = lengths.clamp_min(torch.finfo(torch.float64).tiny)
    return Likeness(
        tuple(row["node"] for row, _ in rows),
        tuple(row["family"] for row, _ in rows),
        lengths,
        products / safe / safe[:, None],
        probes**-0.5,
    )


def _vector(update: Update, basis: Basis | None, within: bool, seed: int, probes: int) -> Tensor:
    """<change, z_k>, float64 [probes]; of a sketch as it would be read alone."""
    changes: list[Change] = []
    for part in parts_of(update):
        if isinstance(part, Sketch):
            assert basis is not None
            changes += [part.reconstruct(basis, within), part.whole_change()]
        elif isinstance(part, Change):
            changes.append(part)
        else:
            changes.append(part.low_rank())
    total = torch.zeros(probes, dtype=torch.float64)
    for change in changes:
        if found := coordinates(change, seed, probes):
            total += vector(found)
    return total


def _basis_of(ledger: Ledger, configuration: RunConfiguration, entry: Entry) -> Basis | None:
    """What the round's sketches were seen through: that of the model that it began with."""
    known = None
    for replayed, model in states(ledger, configuration):
        if replayed.round == entry.round and replayed.rolled_back_to is None:
            break
        known = model.basis
    return known or first_basis(configuration, read_layout(ledger))
