"""The sketched family: a first-order change, seen through a public basis that follows the run.

For a change D [m, n] of a matrix and a basis (Q [n, r], Y [m, r + p]) a node sends P = D Q and
R = D^T Y. Both are linear in D, so sketches sum, mask and clip like any vector; the change itself
comes back, once, from the sum: in the first round, when the basis is random, by a generalised Nystrom
form with a noise level of its own (``nystrom``); later by projection on what the basis has learnt of
the changes before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

import fedkernels as fk
from aggregators.dense import Dense
from aggregators.layout import Layout
from aggregators.low_rank import LowRank
from aggregators.update import require_layout

if TYPE_CHECKING:
    from aggregators.basis import Basis

# Below this share of the largest, a direction of P is what rounding to float32 left.
ROUNDING = 1e-6
# Noise levels that are tried, of the largest square: from what float64 leaves to nothing but noise.
LEVELS = 10 ** torch.linspace(-14, 3, 69, dtype=torch.float64)


@dataclass(frozen=True)
class Views:
    """P = D Q, float64 [m, r], and R = D^T Y, float64 [n, r + p], of one matrix's change D."""

    P: Tensor
    R: Tensor


class Sketch:
    """Coordinates of a change in the basis of ``basis_digest``; a vector space of its own.

    ``views``: name -> (P, R) of matrices. ``whole``: name -> tensor of the layout's shape, for what
    a basis does not see: vectors, and matrices so small that their views would be larger. All are
    kept in float64. Raises ValueError for tensors that the layout does not have or that stand in
    both, for shapes that do not fit and for values that are not finite.

    Sketches of one basis add. What they add up to is no change of the weights: that is what
    ``reconstruct`` makes of the sum, it needs the basis, and in a random one it is not linear. Hence
    ``dense`` gives the coordinates, squared norms are theirs, and other families have no inner product
    with them.
    """

    family: ClassVar[str] = "sketch"

    def __init__(
        self,
        layout: Layout,
        basis_digest: str,
        views: Mapping[str, tuple[Tensor, Tensor]],
        whole: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._layout = layout
        self.basis_digest = basis_digest
        whole = whole or {}
        for name in [*views, *whole]:
            if name not in layout:
                raise ValueError(f"the layout has no tensor {name!r}")
            if name in views and name in whole:
                raise ValueError(f"layer {name!r}: it is sketched or whole, not both")
        self.views = {
            name: _checked_views(layout, name, *views[name])
            for name in sorted(views, key=layout.tensor_id)
        }
        self.whole = {
            name: _checked_whole(layout, name, whole[name])
            for name in sorted(whole, key=layout.tensor_id)
        }

    @classmethod
    def of(cls, layout: Layout, basis: Basis, change: Mapping[str, Tensor]) -> Sketch:
        """See ``change`` (name -> tensor of the layout's shape) through ``basis``.

        Products are computed in the change's type, float32 at least. ValueError for a tensor that the
        basis does not have.
        """
        require_layout(basis.layout, layout)
        views, whole = {}, {}
        for name, tensor in change.items():
            if name in basis.whole:
                whole[name] = tensor
                continue
            if name not in basis.sides:
                raise ValueError(f"the basis has no tensor {name!r}")
            if tuple(tensor.shape) != layout.shape(name):
                raise ValueError(f"layer {name!r}: shape {list(tensor.shape)} is not the layout's")
            exact = tensor if tensor.dtype == torch.float64 else tensor.float()
            sides = basis.sides[name]
            views[name] = (exact @ sides.Q.to(exact.dtype), exact.T @ sides.Y.to(exact.dtype))
        return cls(layout, basis.digest, views, whole)

    @property
    def layout(self) -> Layout:
        """The coordinate system."""
        return self._layout

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.dense().values())

    def reconstruct(self, basis: Basis, within: bool = False) -> LowRank:
        """The change of the sketched matrices, by ``read``. ValueError for another basis.

        A change that was made ``within`` the basis is read exactly, from zero. Of others:

        In the random basis, which has next to nothing of the change, from where ``nystrom`` guesses it.
        In one that has followed the change, from zero: there the guess adds little where it is good,
        and changes from round to round, so that it is sometimes bad; and without it reading is linear,
        hence what nodes keep for error feedback sums to what the server's reading leaves out.
        """
        if basis.digest != self.basis_digest:
            raise ValueError(
                f"a sketch in the basis {self.basis_digest[:12]} cannot be read in"
                f" {basis.digest[:12]}"
            )
        factors = {}
        for name, view in self.views.items():
            sides = basis.sides[name]
            guessed = basis.refinement == 0 and not within
            start = nystrom(view, sides.Y) if guessed else None
            found = read(view, sides.Q, sides.Y, start)
            if found is not None:
                factors[name] = (found[0].float(), found[1].float(), 1.0)
        return LowRank(self.layout, factors)

    def whole_change(self) -> Dense:
        """The change of the tensors that are not sketched."""
        return Dense(self.layout, self.whole)

    def dense(self, layout: Layout | None = None) -> dict[str, Tensor]:
        """The coordinates as float64 tensors: "name#P", "name#R", and "name" of whole tensors."""
        require_layout(layout or self.layout, self.layout)
        found = {}
        for name, view in self.views.items():
            found[f"{name}#P"], found[f"{name}#R"] = view.P, view.R
        return found | self.whole

    def __mul__(self, coefficient: float) -> Sketch:
        factor = float(coefficient)
        return Sketch(
            self.layout,
            self.basis_digest,
            {name: (view.P * factor, view.R * factor) for name, view in self.views.items()},
            {name: tensor * factor for name, tensor in self.whole.items()},
        )

    __rmul__ = __mul__

    def __add__(self, other: Sketch) -> Sketch:
        if not isinstance(other, Sketch):
            return NotImplemented
        self._require_basis(other)
        views = {name: (view.P, view.R) for name, view in self.views.items()}
        for name, view in other.views.items():
            if name not in views:
                views[name] = (view.P, view.R)
                continue
            p, r = views[name]
            if p.shape != view.P.shape or r.shape != view.R.shape:
                raise ValueError(f"layer {name!r}: views of unlike widths cannot be added")
            views[name] = (p + view.P, r + view.R)
        whole = dict(self.whole)
        for name, tensor in other.whole.items():
            whole[name] = whole[name] + tensor if name in whole else tensor
        return Sketch(self.layout, self.basis_digest, views, whole)

    def __sub__(self, other: Sketch) -> Sketch:
        return self + other * -1.0

    def __eq__(self, other: object) -> bool:
        """Equal bases and coordinates, bit for bit."""
        if not isinstance(other, Sketch) or self.layout != other.layout:
            return False
        mine, theirs = self.dense(), other.dense()
        return (
            self.basis_digest == other.basis_digest
            and mine.keys() == theirs.keys()
            and all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def squared_norm(self) -> float:
        """Sum of squares of the coordinates: at most twice that of the change's elements."""
        return self.inner(self)

    def inner(self, other: Any) -> float:
        """Inner product of coordinates. ValueError for other bases and for other families."""
        require_layout(other.layout, self.layout)
        if not isinstance(other, Sketch):
            raise ValueError(
                f"coordinates of a sketch and a change of the family {other.family!r} are of two"
                " spaces: reconstruct first"
            )
        self._require_basis(other)
        theirs = other.dense()
        return sum(
            (float((tensor * theirs[key]).sum()) for key, tensor in self.dense().items()
             if key in theirs),
            0.0,
        )  # fmt: skip

    def _require_basis(self, other: Sketch) -> None:
        require_layout(other.layout, self.layout)
        if other.basis_digest != self.basis_digest:
            raise ValueError(
                f"sketches in the bases {self.basis_digest[:12]} and {other.basis_digest[:12]}"
                " cannot be combined"
            )

    def __repr__(self) -> str:
        return f"Sketch({len(self.views)} matrices, {len(self.whole)} whole tensors)"


def read(
    views: Views, q: Tensor, y: Tensor, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """Factors (B [m, k], A [k, n]) in float64 of what two views say of a change; None for no change.

    The change that is nearest to X, the product of ``start`` (None: zero), and has the views that were
    sent, D' Q = P and D'^T Y = R:

        D' = X + (I - Y Y^T) (P - X Q) Q^T + Y (R - X^T Y)^T

    Q and Y being orthonormal it is X and the projection of X's error on what the views see, so D' is
    never further from the change than X; k is at most 2 r + p. Without X it is linear in the views.
    """
    q, y = q.double(), y.double()
    right, left = views.P, views.R
    stack = []
    if start is not None:
        b, a = start
        right, left = right - b @ (a @ q), left - a.T @ (b.T @ y)
        stack.append((b, a, 1.0))
    right = right - y @ (y.T @ right)
    stack += [(right, q.T.contiguous(), 1.0), (y, left.T.contiguous(), 1.0)]
    u, sigma, vt = fk.stack_svd(stack)
    return (u, sigma[:, None] * vt) if len(sigma) else None


def nystrom(views: Views, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors (B [m, r], A [r, n]) of a generalised Nystrom form; None for no change.

    P (Y^T P)^+ R^T (Tropp, Yurtsever, Udell and Cevher, 2017; Nakatsukasa, 2020) is exact for a change
    of rank r, and unbounded for others: where Y hardly sees a column of P, its inverse multiplies what
    is outside of P's span. Here the columns of D are draws from N(0, c (P P^T + v I)), and the result is
    P times what Y^T D = R^T says of them in the mean: with M = Y^T P,

        P M^T (M M^T + v I)^-1 R^T

    (the part of the mean along Y is ``read``'s). c and v are the most likely ones given R. For a low
    rank v comes out as 0 and this is the form above; for a flat spectrum v is large, and rows that are
    mostly noise are short. No cut has to be chosen, and it needs no oversampling to be stable.
    """
    left, sizes, right = torch.linalg.svd(y.double().T @ views.P)
    seen = left.T @ views.R.T
    squares = torch.zeros(len(seen), dtype=torch.float64)
    squares[: len(sizes)] = sizes.square()
    power = seen.square().sum(dim=1)
    if float(squares[0]) == 0.0 or float(power.sum()) == 0.0:
        return None
    variances = squares + squares[0] * LEVELS[:, None]
    likelihood = variances.log().sum(dim=1) + len(seen) * (power / variances).mean(dim=1).log()
    level = squares[0] * LEVELS[int(likelihood.argmin())]
    weights = sizes / (sizes.square() + level)
    return views.P @ right[: len(sizes)].T, weights[:, None] * seen[: len(sizes)]


def leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left [., k] and right [., k] singular vectors, largest first, but for those of rounding's size."""
    u, sizes, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = sizes > ROUNDING * sizes[0]
    return u[:, kept], vt[kept].T


def _checked_views(layout: Layout, name: str, p: Tensor, r: Tensor) -> Views:
    shape = layout.shape(name)
    if len(shape) != 2:
        raise ValueError(f"layer {name!r}: only matrices are sketched")
    if p.ndim != 2 or r.ndim != 2 or (p.shape[0], r.shape[0]) != shape:
        raise ValueError(
            f"layer {name!r}: P {list(p.shape)} and R {list(r.shape)} are no views of a change of"
            f" shape {list(shape)}"
        )
    if not 1 <= p.shape[1] <= r.shape[1]:
        raise ValueError(f"layer {name!r}: P has {p.shape[1]} columns, and R {r.shape[1]}")
    return Views(_finite(name, p), _finite(name, r))


def _checked_whole(layout: Layout, name: str, tensor: Tensor) -> Tensor:
    if tuple(tensor.shape) != layout.shape(name):
        raise ValueError(f"layer {name!r}: shape {list(tensor.shape)} is not the layout's")
    return _finite(name, tensor)


def _finite(name: str, tensor: Tensor) -> Tensor:
    values = tensor.detach().double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"layer {name!r}: a sketch must be finite")
    return values
