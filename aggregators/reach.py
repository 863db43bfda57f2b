"""What of the weights the probes of a pool move: tensors, for each probe a block of them, and elements.

All of it is public, a function of the layout and a few numbers, so that server and nodes make the same
change of the same scalars.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

import fedkernels as fk
from aggregators.layout import Layout
from aggregators.targets import layer_of

MOST_BLOCKS = 1 << 16
# No probe of a pool has this index (``seed_scalars.LARGEST_POOL``), so the mask is none of them.
MASK_INDEX = (1 << 24) + 1
# A threshold in coarse steps is the same number whatever the last digits of a math library are.
THRESHOLD_STEPS = 1 << 12


@dataclass(frozen=True)
class Reach:
    """``blocks`` B: probe k moves block k mod B alone (block-wise coordinate descent over layers).

    ``density``: the share of every tensor's elements that moves, drawn once for the run, the same for
    all probes. Raises ValueError for numbers that are none of these.
    """

    blocks: int = 1
    density: float = 1.0

    def __post_init__(self) -> None:
        if type(self.blocks) is not int or not 1 <= self.blocks <= MOST_BLOCKS:
            raise ValueError(f"blocks must be in [1, {MOST_BLOCKS}], and it is {self.blocks!r}")
        if type(self.density) not in (int, float) or not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], and it is {self.density!r}")

    def block_of(self, layout: Layout, names: Iterable[str]) -> dict[str, int]:
        """The block of every tensor: consecutive layers, in as even numbers as can be.

        A tensor outside of the layers counts as a layer of its own. ValueError where a block would be
        empty.
        """
        chosen = sorted(names, key=layout.tensor_id)
        groups: dict[str, int] = {}
        for name in chosen:
            groups.setdefault(layer_of(name) or name, len(groups))
        if len(groups) < self.blocks:
            raise ValueError(f"{self.blocks} blocks of {len(groups)} layers: some would be empty")
        return {n: groups[layer_of(n) or n] * self.blocks // len(groups) for n in chosen}

    def mask(
        self, master_seed: int, tensor_id: int, shape: Sequence[int], part: fk.Part | None = None
    ) -> Tensor | None:
        """True for the elements that move; None: all. ``shape``, ``part``: as of ``fk.noise``.

        An element moves where its normal number is below the density's quantile.
        """
        if self.density >= 1:
            return None
        quantile = NormalDist().inv_cdf(self.density)
        threshold = round(quantile * THRESHOLD_STEPS) / THRESHOLD_STEPS
        seed = fk.derive_seed(master_seed, MASK_INDEX)
        return fk.noise(seed, tensor_id, shape, "gaussian", part) < threshold


EVERYTHING = Reach()
