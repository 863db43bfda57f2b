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
from aggregators.pair import parts_of
from fedserver.configuration import RunConfiguration
from fedserver.ledger import Ledger, LedgerError
from fedserver.replay import accepted_updates, admit_again, basis_of
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
    entry = ledger.round(number)
    if entry is None:
        raise LedgerError(f"{ledger.folder}: round {number} is not in the ledger")
    rows = accepted_updates(entry)
    if not rows:
        raise LedgerError(f"{ledger.folder}: round {number} accepted no update")
    layout = read_layout(ledger)
    basis = basis_of(ledger, configuration, entry)
    vectors = []
    for row in rows:
        update = admit_again(ledger, configuration, entry, row, layout, basis).update
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
        tuple(row["node"] for row in rows),
        tuple(row["family"] for row in rows),
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
