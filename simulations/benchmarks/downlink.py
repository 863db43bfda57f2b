"""What a node receives per round: flat in the number of nodes, and against FLoRA's whole stack.

    python -m simulations.benchmarks.downlink

Bytes are those of real plan messages for the base model's layout; the updates' values are random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from aggregators import Carry, Layout, LowRank, aggregate, match_targets
from aggregators.codec import encode
from aggregators.low_rank import stack
from fedclient import base_model

# FLoRA's heterogeneous ranks (Wang et al., 2024): 10 clients, 160 in all.
REFERENCE_RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)


def random_update(layout: Layout, names: Sequence[str], rank: int, seed: int) -> LowRank:
    """A rank-``rank`` change of the named matrices with normal factors."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Any] = {}
    for name in names:
        rows, columns = layout.shape(name)
        width = min(rank, rows, columns)
        b = torch.randn(rows, width, generator=generator)
        a = torch.randn(width, columns, generator=generator) / math.sqrt(columns)
        factors[name] = (b, a, 2.0)
    return LowRank(layout, factors)


def downlink(
    layout: Layout, names: Sequence[str], ranks: Sequence[int], cap: int, dtype: str
) -> dict[str, int]:
    """Bytes per node of the capped view and of FLoRA's whole stack, for one round of ``ranks``.

    FLoRA's published code sends float32; the stack in the view's own type stands beside it.
    """
    updates = [random_update(layout, names, rank, seed) for seed, rank in enumerate(ranks)]
    change = aggregate([(update, 1.0) for update in updates], layout).updates["low_rank"]
    assert isinstance(change, LowRank)
    view = Carry.empty(layout).add(change).head(cap)
    return {
        "nodes": len(ranks),
        "stack_rank": sum(ranks),
        "view_rank": max(view.ranks.values()),
        "view": len(encode(view, dtype)),
        "stack": len(encode(stack(updates), dtype)),
        "stack_float32": len(encode(stack(updates), "float32")),
    }


def main(
    model: str = base_model.DEFAULT_MODEL,
    cap: Annotated[int, typer.Option(help="view_rank")] = 32,
    dtype: str = "bfloat16",
    target: Annotated[list[str] | None, typer.Option()] = None,
) -> None:
    """Print bytes per node for 6, 10 and 60 nodes with the reference ranks, repeated."""
    layout = Layout.from_model(base_model.load(model).model)
    names = match_targets(layout, target or ["q_proj", "v_proj"])
    table = Table(
        title=f"{model}, {len(names)} matrices, cap {cap}, {dtype}, bytes per node and round"
    )
    for heading in ("nodes", "stack rank", "view rank", "braid", "stack, same type",
                    "ratio", "stack, float32", "ratio"):  # fmt: skip
        table.add_column(heading, justify="right")
    for count in (6, 10, 60):
        ranks = [REFERENCE_RANKS[i % len(REFERENCE_RANKS)] for i in range(count)]
        row = downlink(layout, names, ranks, cap, dtype)
        table.add_row(
            f"{row['nodes']}", f"{row['stack_rank']}", f"{row['view_rank']}", f"{row['view']:,}",
            f"{row['stack']:,}", f"{row['stack'] / row['view']:.2f} ×",
            f"{row['stack_float32']:,}", f"{row['stack_float32'] / row['view']:.2f} ×",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
