"""Which probes of a pool reach which tensors of a model in use, and which elements of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import fedkernels as fk
from aggregators import Layout, TensorSpec
from aggregators.reach import EVERYTHING, Reach
from fedclient.local.walk import Terms, move_, perturbed


class Scope:
    """The probes of ``master_seed`` over the tensors ``names`` (None: all), with their ``reach``.

    Probes are asked for by index and go by their seed from then on. Raises ValueError for more blocks
    than layers.
    """

    def __init__(
        self,
        layout: Layout,
        names: Sequence[str] | None,
        master_seed: int = 0,
        reach: Reach = EVERYTHING,
    ) -> None:
        self.names, self.reach, self._master_seed = names, reach, master_seed
        reached = [spec.name for spec in layout] if names is None else names
        self._block_of_tensor = reach.block_of(layout, reached)
        self._block_of_seed: dict[int, int] = {}

    def seed(self, index: int) -> int:
        """The seed of probe ``index`` of the pool."""
        seed = fk.derive_seed(self._master_seed, index)
        self._block_of_seed[seed] = index % self.reach.blocks
        return seed

    @property
    def masked(self) -> bool:
        """Whether some elements stay."""
        return self.reach.density < 1

    def reaches(self, spec: TensorSpec, seed: int) -> bool:
        """Whether a probe moves anything of a tensor."""
        if self.reach.blocks == 1:
            return True
        return self._block_of_tensor[spec.name] == self._block_of_seed[seed]

    def of(self, spec: TensorSpec, terms: Terms) -> dict[int, float]:
        """Those of the terms whose probes reach the tensor."""
        return {seed: amount for seed, amount in terms.items() if self.reaches(spec, seed)}

    def move_(
        self,
        weight: Tensor,
        terms: Terms,
        spec: TensorSpec,
        probe: str,
        part: fk.Part | None = None,
    ) -> Tensor:
        """``walk.move_`` for what the terms' probes reach of the tensor."""
        reached = self.of(spec, terms)
        if not any(reached.values()):
            return weight
        mask = self._mask(weight, spec, part)
        if mask is None:
            return move_(weight, reached, spec.tensor_id, probe, part)
        before = weight.clone()
        moved = move_(weight, reached, spec.tensor_id, probe, part)
        return moved.copy_(torch.where(mask, moved, before))

    def perturbed(
        self,
        weight: Tensor,
        seed: int,
        scale: float,
        spec: TensorSpec,
        probe: str,
        out: Tensor,
        part: fk.Part | None,
    ) -> Tensor:
        """``walk.perturbed`` into ``out``, for a probe that reaches the tensor."""
        moved = perturbed(weight, seed, scale, spec.tensor_id, probe, out, part)
        mask = self._mask(weight, spec, part)
        return moved if mask is None else moved.copy_(torch.where(mask, moved, weight))

    def _mask(self, weight: Tensor, spec: TensorSpec, part: fk.Part | None) -> Tensor | None:
        return self.reach.mask(self._master_seed, spec.tensor_id, weight.shape, part)
