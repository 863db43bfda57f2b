"""The dense family: whole tensors, for norms, heads and other small parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from aggregators.layout import Layout
from aggregators.update import require_layout


class Dense:
    """A change given element by element: name -> tensor of the layout's shape.

    Raises ValueError for tensors that the layout does not have and for other shapes.
    """

    family: ClassVar[str] = "dense"

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        self._layout = layout
        for name, tensor in tensors.items():
            if name not in layout:
                raise ValueError(f"the layout has no tensor {name!r}")
            if tuple(tensor.shape) != layout.shape(name):
                raise ValueError(
                    f"layer {name!r}: shape {list(tensor.shape)} is not {list(layout.shape(name))}"
                )
            if not tensor.is_floating_point():
                raise ValueError(f"layer {name!r}: a change must be floating point")
        self.tensors = dict(tensors)

    @property
    def layout(self) -> Layout:
        """The coordinate system."""
        return self._layout

    def dense(self, layout: Layout | None = None) -> dict[str, Tensor]:
        """The change as float64 tensors."""
        require_layout(layout or self.layout, self.layout)
        return {name: tensor.double() for name, tensor in self.tensors.items()}

    def __mul__(self, coefficient: float) -> Dense:
        # In float64: scaling by a share and adding must not round twice in a short type.
        return Dense(self.layout, {n: t.double() * coefficient for n, t in self.tensors.items()})

    __rmul__ = __mul__

    def __add__(self, other: Dense) -> Dense:
        if not isinstance(other, Dense):
            return NotImplemented
        require_layout(other.layout, self.layout)
        total = {name: tensor.double() for name, tensor in self.tensors.items()}
        for name, tensor in other.tensors.items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
        return Dense(self.layout, total)

    def __sub__(self, other: Dense) -> Dense:
        return self + other * -1.0

    def __eq__(self, other: object) -> bool:
        """Equal tensors, bit for bit, of equal types."""
        if not isinstance(other, Dense) or self.layout != other.layout:
            return False
        return self.tensors.keys() == other.tensors.keys() and all(
            tensor.dtype == other.tensors[name].dtype and torch.equal(tensor, other.tensors[name])
            for name, tensor in self.tensors.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def squared_norm(self) -> float:
        """Sum of squares of all elements."""
        return self.inner(self)

    def inner(self, other: Any) -> float:
        """Inner product; with another family, which knows a shorter way than its dense form."""
        require_layout(other.layout, self.layout)
        if not isinstance(other, Dense):
            return float(other.inner(self))
        shared = sorted(self.tensors.keys() & other.tensors.keys(), key=self.layout.tensor_id)
        products = (self.tensors[n].double() * other.tensors[n].double() for n in shared)
        return sum((float(product.sum()) for product in products), 0.0)

    def __repr__(self) -> str:
        return f"Dense({len(self.tensors)} tensors)"
