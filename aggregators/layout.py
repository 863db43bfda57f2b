"""The layout: the coordinate system in which every update of a run is expressed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class TensorSpec:
    """One parameter: ``first_element`` is the global index of its element 0."""

    name: str
    shape: tuple[int, ...]
    tensor_id: int
    first_element: int


class Layout:
    """The ordered parameters of a base model, tied weights once. Equal layouts are interchangeable.

    A parameter's tensor id is its position. ``fingerprint`` is the SHA-256 of the canonical JSON of
    names and shapes.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        specs, first = [], 0
        for tensor_id, (name, shape) in enumerate(shapes.items()):
            sizes = tuple(int(size) for size in shape)
            if not name or any(size < 1 for size in sizes):
                raise ValueError(f"layout: tensor {name!r} has the impossible shape {list(sizes)}")
            specs.append(TensorSpec(name, sizes, tensor_id, first))
            first += math.prod(sizes)
        self._tensors = tuple(specs)
        self._by_name = {spec.name: spec for spec in specs}

    @classmethod
    def from_model(cls, model: Any) -> Layout:
        """The layout of a torch module: its named parameters in order, tied ones once."""
        return cls({name: tuple(p.shape) for name, p in model.named_parameters()})

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All tensors; a tensor's id is its position."""
        return self._tensors

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def elements(self) -> int:
        """Number of weights."""
        return sum(math.prod(spec.shape) for spec in self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; KeyError when there is none of that name."""
        return self._by_name[name].shape

    def tensor_id(self, name: str) -> int:
        """Position of a tensor; KeyError when there is none of that name."""
        return self._by_name[name].tensor_id

    def to_json(self) -> str:
        """Canonical JSON: a list of [name, shape]."""
        return json.dumps(
            [[spec.name, list(spec.shape)] for spec in self.tensors], separators=(",", ":")
        )

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Read ``to_json``'s text. ValueError for anything else."""
        try:
            pairs = json.loads(text)
            if not isinstance(pairs, list):
                raise ValueError("not a list of [name, shape]")
            shapes = {_name(name): _sizes(shape) for name, shape in pairs}
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a layout: {error}") from None
        if len(shapes) != len(pairs):
            raise ValueError("not a layout: a name stands in it twice")
        return cls(shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Layout({len(self)} tensors, {self.fingerprint[:12]})"


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the name {value!r} is not a string")
    return value


def _sizes(value: Any) -> list[int]:
    # No int(): it takes digits from a string, cuts fractions off and overflows on 1e999.
    if not isinstance(value, list) or any(type(size) is not int for size in value):
        raise ValueError(f"the shape {value!r} is not a list of whole numbers")
    return value
