"""The public basis of sketches: random at first, then one step of power iteration a round.

Every node of a round uses the same basis, so their sketches add. It follows from the run's seed and
its aggregates, hence from the ledger; because factorisations round differently on unlike machines it
is also a message, and its digest, not the way to it, is what must agree.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fedkernels as fk
from aggregators.codec import pack, unpack
from aggregators.layout import Layout
from aggregators.sketch import Sketch, leading
from aggregators.update import UpdateRejected, Verdict

SCHEMA = 2
# Seeds of one basis's streams: the first right sides, the first left sides, then fresh columns.
RIGHT, LEFT, FRESH = 0, 1, 2
# Columns of the first basis for one of Q later: a random basis has to be wider to see as much.
FIRST_RIGHT, FIRST_LEFT = 3, 4
# A column that keeps less than this beside the earlier ones is made of them.
DEPENDENT = 1e-4


@dataclass(frozen=True)
class Sides:
    """Q float32 [n, k] and Y float32 [m, l], k <= l, of a matrix [m, n]: orthonormal columns."""

    Q: Tensor
    Y: Tensor


class Basis:
    """What the changes of a layout's tensors are seen through. Immutable.

    ``sides``: name -> (Q, Y). ``whole``: names of tensors that are sent as they are. ``refinement``
    counts the steps since the random basis of ``master_seed``; refined bases have ``rank`` columns on
    the right and ``rank + oversampling`` on the left. Raises ValueError for tensors that the layout does
    not have and for sides that do not fit.
    """

    def __init__(
        self,
        layout: Layout,
        sides: Mapping[str, tuple[Tensor, Tensor]],
        whole: Iterable[str],
        master_seed: int,
        rank: int,
        oversampling: int,
        refinement: int = 0,
    ) -> None:
        if rank < 1 or oversampling < 0:
            raise ValueError(f"rank {rank} with oversampling {oversampling} is no basis")
        if not 0 <= master_seed < 2**63 or refinement < 0:
            raise ValueError(f"no basis has the seed {master_seed} and {refinement} refinements")
        self._layout = layout
        self.master_seed, self.refinement = master_seed, refinement
        self.rank, self.oversampling = rank, oversampling
        whole = set(whole)
        for name in [*sides, *whole]:
            if name not in layout:
                raise ValueError(f"the layout has no tensor {name!r}")
            if name in sides and name in whole:
                raise ValueError(f"layer {name!r}: it is sketched or whole, not both")
        for name, (q, y) in sides.items():
            _check(layout, name, q, y)
        self.sides = {name: Sides(*sides[name]) for name in sorted(sides, key=layout.tensor_id)}
        self.whole = tuple(sorted(whole, key=layout.tensor_id))

    @classmethod
    def random(
        cls,
        layout: Layout,
        names: Iterable[str],
        master_seed: int,
        rank: int,
        oversampling: int,
        wide: bool = True,
    ) -> Basis:
        """The basis before anything is known: Gaussian probes, made orthonormal.

        It is ``wide``: 3 r columns on the right and 4 r on the left (r + p at least), with which one
        look at a change is within 1.5 of the best of rank r; refined bases have r and r + p. A matrix
        that this would not make smaller gets r and r + p at once, and one [m, n] with
        m r + n (r + p) >= m n or with less than r + p rows or columns is sent whole, as vectors are. The
        columns of a smaller rank are the first ones of a larger. Raises ValueError for a rank below 1,
        oversampling below 0 and names that the layout does not have.
        """
        sides: dict[str, tuple[Tensor, Tensor]] = {}
        whole = []
        for name in names:
            if name not in layout:
                raise ValueError(f"the layout has no tensor {name!r}")
            shape, tensor_id = layout.shape(name), layout.tensor_id(name)
            found = side_widths(shape, rank, oversampling, wide=wide)
            if found is None:
                whole.append(name)
                continue
            right, left = found
            sides[name] = (
                independent(
                    [_noise(master_seed, RIGHT, tensor_id, shape[1], right)], right
                ).float(),
                independent([_noise(master_seed, LEFT, tensor_id, shape[0], left)], left).float(),
            )
        return cls(layout, sides, whole, master_seed, rank, oversampling)

    def refined(self, aggregate: Sketch) -> Basis:
        """The next basis, from the sum of sketches in this one: one step of power iteration.

        P = D Q leads to left singular vectors of the change, R = D^T Y to right ones: the new Q is
        R's r leading left singular vectors, and Y begins with P's. Of Y's other p columns three of
        four are what the old Y saw most of: without this memory the two iterations do not know of each
        other, and where singular values are close P may turn to where Y is blind. The rest are fresh
        random columns, which see what is new. Where the aggregate has no change, or one of a smaller
        rank, earlier columns stay. After a wide first basis each has its r and r + p columns. ValueError
        for a sketch in another basis.
        """
        if aggregate.basis_digest != self.digest:
            raise ValueError("a basis is refined by a sketch in it, and this one is of another")
        following: dict[str, tuple[Tensor, Tensor]] = {}
        rank, wide = self.rank, self.rank + self.oversampling
        for name, old in self.sides.items():
            left, seen, right = old.Y[:, :0], old.Y[:, :0], old.Q[:, :0]
            if name in aggregate.views:
                view = aggregate.views[name]
                left, _ = leading(view.P)
                right, mixture = leading(view.R)
                seen = old.Y.double() @ mixture
            stream, tensor_id = FRESH + self.refinement, self.layout.tensor_id(name)
            fresh = _noise(self.master_seed, stream, tensor_id, old.Y.shape[0], wide)
            known = independent([left, seen, old.Y], rank + 3 * (wide - rank) // 4)
            following[name] = (
                independent([right, old.Q], rank).float(),
                independent([known, fresh], wide).float(),
            )
        return Basis(
            self.layout, following, self.whole, self.master_seed, self.rank, self.oversampling,
            self.refinement + 1,
        )  # fmt: skip

    @property
    def layout(self) -> Layout:
        """The coordinate system."""
        return self._layout

    @property
    def size(self) -> int:
        """How many numbers a sketch of all its tensors has."""
        viewed = sum(len(s.Y) * s.Q.shape[1] + len(s.Q) * s.Y.shape[1] for s in self.sides.values())
        return viewed + Layout({name: self.layout.shape(name) for name in self.whole}).elements

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of ``to_bytes``."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def names(self) -> Set[str]:
        """The tensors that it sketches, and those that it leaves whole."""
        return self.sides.keys() | set(self.whole)

    def check(self, sketch: Sketch) -> None:
        """Raise UpdateRejected unless ``sketch`` is one in this basis; fewer tensors are allowed."""
        if sketch.layout != self.layout:
            raise UpdateRejected(Verdict.WRONG_LAYOUT, "the sketch is of another layout")
        if sketch.basis_digest != self.digest:
            raise UpdateRejected(
                Verdict.WRONG_BASIS,
                f"a sketch in the basis {sketch.basis_digest[:12]}, this round's is"
                f" {self.digest[:12]}",
            )
        for name, view in sketch.views.items():
            if name not in self.sides:
                raise UpdateRejected(
                    Verdict.UNKNOWN_TENSOR, f"layer {name!r} is not sketched in this basis"
                )
            widths = (view.P.shape[1], view.R.shape[1])
            expected = (self.sides[name].Q.shape[1], self.sides[name].Y.shape[1])
            if widths != expected:
                raise UpdateRejected(
                    Verdict.SHAPE, f"layer {name!r}: widths {widths}, the basis has {expected}"
                )
        for name in sketch.whole:
            if name not in self.whole:
                raise UpdateRejected(
                    Verdict.UNKNOWN_TENSOR, f"layer {name!r} is not sent whole in this basis"
                )

    def to_bytes(self) -> bytes:
        """Deterministic bytes."""
        return pack(*self.parts())

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors, for a message that carries more beside them."""
        tensors: dict[str, Tensor] = {}
        for name, sides in self.sides.items():
            tensors |= {f"{name}#Q": sides.Q, f"{name}#Y": sides.Y}
        header = {
            "schema": SCHEMA,
            "basis": self.layout.fingerprint,
            "seed": self.master_seed,
            "rank": self.rank,
            "oversampling": self.oversampling,
            "refinement": self.refinement,
            "whole": [self.layout.tensor_id(name) for name in self.whole],
        }
        return header, tensors

    @classmethod
    def from_bytes(cls, data: bytes, layout: Layout) -> Basis:
        """Read ``to_bytes``'s bytes. ValueError for anything else."""
        try:
            header, tensors = unpack(data)
        except UpdateRejected as error:
            raise ValueError(f"not a basis: {error}") from None
        return cls.from_parts(header, tensors, layout)

    @classmethod
    def from_parts(
        cls, header: dict[str, Any], tensors: dict[str, Tensor], layout: Layout
    ) -> Basis:
        """What ``parts`` wrote. ValueError for anything else."""
        if header.get("schema") != SCHEMA or header.get("basis") != layout.fingerprint:
            raise ValueError("this basis is of another layout, or no basis")
        numbers: list[Any] = [
            header.get(key) for key in ("seed", "rank", "oversampling", "refinement")
        ]
        whole = header.get("whole")
        if not all(type(number) is int for number in numbers) or not isinstance(whole, list):
            raise ValueError("not a basis: its header is incomplete")
        if not all(type(index) is int and 0 <= index < len(layout) for index in whole):
            raise ValueError("not a basis: it names tensors that the layout does not have")
        names = {key.rpartition("#")[0] for key in tensors}
        expected = {f"{name}#{part}" for name in names for part in "QY"}
        if unlike := sorted(expected ^ tensors.keys()):
            raise ValueError(f"not a basis: {unlike[0]!r} is missing or has no place")
        sides = {name: (tensors[f"{name}#Q"], tensors[f"{name}#Y"]) for name in names}
        return cls(layout, sides, [layout.tensors[i].name for i in whole], *numbers)

    def __repr__(self) -> str:
        return f"Basis({len(self.sides)} matrices, {len(self.whole)} whole, {self.digest[:12]})"


def independent(blocks: Sequence[Tensor], width: int) -> Tensor:
    """The first ``width`` independent directions of the blocks' columns: orthonormal float64 [., width].

    Gram and Schmidt's way, twice over and in float64: unlike a library's QR it has no freedom of
    sign, and leaves out what depends on earlier columns. ValueError where there are too few.
    """
    columns = torch.cat([block.double() for block in blocks], dim=1)
    found = torch.zeros(columns.shape[0], width, dtype=torch.float64)
    count = 0
    for column in columns.T:
        if count == width:
            break
        size = column.norm()
        for _ in range(2):
            column = column - found[:, :count] @ (found[:, :count].T @ column)
        rest = column.norm()
        if rest > DEPENDENT * size:
            found[:, count] = column / rest
            count += 1
    if count < width:
        raise ValueError(f"there are {count} independent columns, and {width} are needed")
    return found


def side_widths(
    shape: Sequence[int], rank: int, oversampling: int, *, wide: bool
) -> tuple[int, int] | None:
    """Columns of Q and of Y for a tensor; ``wide``: in a run's first basis. None: it is sent whole."""
    narrow = (rank, rank + oversampling)
    widest = (FIRST_RIGHT * rank, max(FIRST_LEFT * rank, rank + oversampling))
    if not _shrinks(shape, *narrow):
        return None
    return widest if wide and _shrinks(shape, *widest) else narrow


def _shrinks(shape: Sequence[int], rank: int, wide: int) -> bool:
    if len(shape) != 2 or wide > min(shape):
        return False
    rows, columns = shape
    return rows * rank + columns * wide < rows * columns


def _noise(master_seed: int, stream: int, tensor_id: int, rows: int, columns: int) -> Tensor:
    """Gaussian columns; fewer columns are the first ones of more."""
    seed = fk.derive_seed(master_seed, stream)
    return fk.noise(seed, tensor_id, (columns, rows), "gaussian").T


def _check(layout: Layout, name: str, q: Tensor, y: Tensor) -> None:
    shape = layout.shape(name)
    if len(shape) != 2 or q.ndim != 2 or y.ndim != 2 or (y.shape[0], q.shape[0]) != shape:
        raise ValueError(
            f"layer {name!r}: Q {list(q.shape)} and Y {list(y.shape)} are no sides of a matrix of"
            f" shape {list(shape)}"
        )
    if not 1 <= q.shape[1] <= y.shape[1] <= min(shape):
        raise ValueError(f"layer {name!r}: Q has {q.shape[1]} columns, and Y {y.shape[1]}")
    for side in (q, y):
        if side.dtype != torch.float32:
            raise ValueError(f"layer {name!r}: sides are float32, not {side.dtype}")
        gram = side.double().T @ side.double()
        # Written so that NaN fails.
        if not bool(((gram - torch.eye(len(gram))).abs() < 1e-3).all()):
            raise ValueError(f"layer {name!r}: a side's columns are not orthonormal")
