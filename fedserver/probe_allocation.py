"""How a round's probes are spread over tensors: by what the last projected round showed of each.

The coordinate <D, z> of a change D along a probe of unit variance has the mean square ||D||^2. So the
sums that every node has tell the norm of each tensor's last aggregate: the spread is public, follows
from the ledger, and needs no message.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from aggregators.layout import Layout
from aggregators.probe_sum import ProbeSum
from aggregators.projected import shrinkage


def size_norms(layout: Layout, names: Iterable[str]) -> dict[str, float]:
    """What norms are like where nothing is known: the root of each tensor's size."""
    return {name: math.sqrt(math.prod(layout.shape(name))) for name in names}


def measured_norms(
    sums: Sequence[ProbeSum], seeds: Collection[int], names: Collection[str], scale: str
) -> dict[str, float] | None:
    """Norms of a round's change by tensor, from its projections; None where it made none.

    ``seeds``: the master seeds of the round's probes; with seeds of their own nodes' changes count as
    orthogonal. ``scale``: how coordinates were read, "unbiased" or "mmse". Tensors of ``names`` that no
    projection reached have the smallest norm that was measured.
    """
    squares: dict[str, float] = {}
    for one in sums:
        if one.master_seed not in seeds:
            continue
        for name, place in one.places.items():
            totals = one.vectors[place].double()
            count = len(totals)
            read = 1.0
            if scale == "mmse":
                read = shrinkage(count, math.prod(one.layout.shape(name)), one.probe)
            # A total is read * <D, z> / K, in steps of a power of two.
            coordinates = totals * math.ldexp(count / read, one.exponent)
            squares[name] = squares.get(name, 0.0) + float(coordinates.square().mean())
    if not squares:
        return None
    least = min(squares.values())
    return {name: math.sqrt(squares.get(name, least)) for name in names}
