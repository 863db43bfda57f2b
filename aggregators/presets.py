"""Presets as data: how a node starts, what it sends, how the server folds it in, what nodes see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Strand = Literal["lora", "zeroth-order", "projected"]
STRANDS: tuple[str, ...] = get_args(Strand)


@dataclass(frozen=True)
class Preset:
    """One federated method.

    ``strand``: how all nodes train; None: each as its own entry says, LoRA where it says nothing.
    ``basis``: of projected nodes, ``sampling``: of zeroth-order nodes; None: as the scenario says. The
    rest is of LoRA nodes. ``view``: "capped" (rank limit), "whole", or "node_rank".
    """

    name: str
    summary: str
    strand: Strand | None = "lora"
    basis: Literal["adaptive", "random"] | None = None
    sampling: Literal["uniform", "magnitude"] | None = None
    start: Literal["fresh", "view"] = "fresh"
    init: str = "random"
    train_a: bool = True
    sends: Literal["factors", "delta"] = "factors"
    server: Literal["add", "average_factors"] = "add"
    view: Literal["capped", "whole", "node_rank"] = "capped"


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("braid", "exact stacks, recompressed carry with error feedback"),
        Preset("flora", "exact stacks, the whole sum without truncation (Wang et al., 2024)",
               view="whole"),
        Preset("fedit", "baseline: A and B averaged separately, zero-padded (Zhang et al., 2024)",
               start="view", init="previous", server="average_factors", view="node_rank"),
        Preset("ffa-lora", "A fixed by a shared seed, only B is trained (Sun et al., 2024)",
               init="shared", train_a=False),
        Preset("flexlora", "nodes train the carry's first components (Bai et al., 2024), as deltas",
               start="view", init="carry", sends="delta", view="node_rank"),
        Preset("fedkseed", "forward passes alone; scalars along a pool of seeds (Qin et al., 2024)",
               strand="zeroth-order", sampling="uniform"),
        Preset("fedkseed-pro", "the same, seeds drawn by the mean size of what was measured along them",
               strand="zeroth-order", sampling="magnitude"),
        Preset("ferret", "all weights by backpropagation, projected on random probes (Shu et al., 2024)",
               strand="projected", basis="random"),
        Preset("braid-projected", "the same, seen through a public basis that follows the aggregate",
               strand="projected", basis="adaptive"),
        Preset("mixed", "each node by its own strand; the families of a round add", strand=None),
    )
}  # fmt: skip
