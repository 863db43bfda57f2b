"""Presets as data: how a node starts, what it sends, how the server folds it in, what nodes see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """One federated LoRA method. ``view``: "capped" (rank limit), "whole", or "node_rank"."""

    name: str
    summary: str
    start: Literal["fresh", "view"]
    init: str
    train_a: bool
    sends: Literal["factors", "delta"]
    server: Literal["add", "average_factors"]
    view: Literal["capped", "whole", "node_rank"]


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("braid", "exact stacks, recompressed carry with error feedback",
               "fresh", "random", True, "factors", "add", "capped"),
        Preset("flora", "exact stacks, the whole sum without truncation (Wang et al., 2024)",
               "fresh", "random", True, "factors", "add", "whole"),
        Preset("fedit", "baseline: A and B averaged separately, zero-padded (Zhang et al., 2024)",
               "view", "previous", True, "factors", "average_factors", "node_rank"),
        Preset("ffa-lora", "A fixed by a shared seed, only B is trained (Sun et al., 2024)",
               "fresh", "shared", False, "factors", "add", "capped"),
        Preset("flexlora", "nodes train the carry's first components (Bai et al., 2024), as deltas",
               "view", "carry", True, "delta", "add", "node_rank"),
    )
}  # fmt: skip
