"""The table ``data`` of a scenario."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedserver.scenario.table import Table


class DataConfiguration(Table):
    """Where the simulated nodes' data come from and how they are divided."""

    source: str = Field(default="chatterbot", description="chatterbot, a .jsonl file, or hf:NAME")
    partition: Literal["categories", "category", "dirichlet", "iid", "shards"] = "iid"
    key: str | None = Field(default=None, description="column to divide by")
    alpha: float = Field(default=0.5, gt=0, description="Dirichlet concentration")
    split: Literal["questions", "pairs", "rows"] = Field(
        default="questions",
        description="hold out whole questions, questions with one of their answers, or single rows",
    )
    held_out: float = Field(default=0.1, gt=0, lt=1, description="share kept for evaluation")
    held_out_max: int = Field(default=64, ge=1, description="evaluation examples a node, at most")
    limit_per_node: int | None = Field(default=None, ge=1)
