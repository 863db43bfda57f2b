"""The singular value decomposition of a sum of low-rank products, without ever forming the sum.

A sum of products sum_i B_i diag(s_i) A_i is one stack B S A: B [m, R], A [R, n], S diagonal.
Its decomposition follows from that of a small core, in one of two ways:

    qr      B = Q_b R_b and A^T = Q_a R_a by Householder reflections; the core is R_b S R_a^T.
    gram    B^T B = L_b L_b^T and A A^T = L_a L_a^T by Cholesky, so that B = Q_b L_b^T; the core is
            L_b^T S L_a and Q_b is B L_b^-T, never formed either. Matrix products only, hence
            faster; but Q_b is orthogonal only to 2^-52 times the squared condition number of B, so
            this path bounds that number and gives way to qr where a float32 result would show it.

Truncating the decomposition is optimal (Eckart and Young, 1936): the error is the norm of what is
cut off. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

METHODS = ("auto", "qr", "gram")

# A float32 result of Frobenius norm 1 carries a rounding error of about this size: directions that
# are smaller than this together are rounding noise of earlier results, and are not kept.
ROUNDING = 2.0**-23

# Largest squared condition number for the Gram path: its singular vectors are then orthogonal to
# about 2**-52 times this, which float32 does not show.
CONDITION_LIMIT = 1e8

# Rows that the Gram path converts to float64 at once.
ROWS_AT_ONCE = 1024

Scale = float | torch.Tensor
Decomposition = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def stack_svd(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor, Scale]],
    rank: int | None = None,
    energy: float | None = None,
    method: str = "auto",
) -> Decomposition:
    """Return the truncated singular value decomposition of sum_i B_i diag(scale_i) A_i.

    Args:
        factors: (B [m, r], A [r, n], scale: a number or a tensor [r]) for each summand; any
            floating dtype, any r, m and n equal in all of them.
        rank: keep at most so many directions.
        energy: keep the fewest directions that hold this fraction, in (0, 1], of the squared
            Frobenius norm.
        method: "qr"; "gram", which gives way to qr where it would be less accurate; or "auto":
            gram where the stack is thin, else qr.

    Returns:
        (U float32 [m, k], sigma float64 [k], Vt float32 [k, n]), sigma falling. The entry of
        largest magnitude in each column of U is positive, so equal input gives equal output.
        Directions that are numerically zero (see `ROUNDING`) are dropped; k is 0 for a zero sum.

    Raises:
        ValueError: no factors, shapes that do not fit, values that are not finite, or a rank,
            energy or method outside its range.
    """
    if rank is not None and rank < 0:
        raise ValueError(f"rank must not be negative, and it is {rank}")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"energy must be in (0, 1], and it is {energy}")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; available: {', '.join(METHODS)}")
    stack = _Stack.of(factors)
    result = None
    if method == "gram" or (method == "auto" and 2 * stack.rank <= min(stack.m, stack.n)):
        result = _by_gram(stack, rank, energy)
    u, sigma, v = result if result is not None else _by_qr(stack, rank, energy)
    largest = u.abs().argmax(dim=0, keepdim=True) if u.numel() else u.new_zeros(1, 0).long()
    sign = torch.where(u.gather(0, largest) < 0, -1.0, 1.0)
    return u.mul_(sign), sigma, v.mul_(sign).T.contiguous()


@dataclass(frozen=True)
class _Stack:
    """Tall factors: B = [left_1 ...] [m, R], A^T = [right_1 ...] [n, R], scale float64 [R]."""

    left: list[torch.Tensor]
    right: list[torch.Tensor]
    scale: torch.Tensor

    @property
    def m(self) -> int:
        return self.left[0].shape[0]

    @property
    def n(self) -> int:
        return self.right[0].shape[0]

    @property
    def rank(self) -> int:
        return self.scale.numel()

    @classmethod
    def of(cls, factors: Sequence[tuple[torch.Tensor, torch.Tensor, Scale]]) -> _Stack:
        if not factors:
            raise ValueError("a stack needs at least one (B, A, scale)")
        m, n = factors[0][0].shape[0], factors[0][1].shape[-1]
        left, right, scales = [], [], []
        for position, (b, a, scale) in enumerate(factors):
            if b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0]:
                shapes = f"{list(b.shape)} and {list(a.shape)}"
                raise ValueError(f"factor {position}: shapes {shapes} are not [m, r] and [r, n]")
            if b.shape[0] != m or a.shape[1] != n:
                found = f"{b.shape[0]} x {a.shape[1]}"
                raise ValueError(f"factor {position} is {found}, and the first is {m} x {n}")
            if not b.is_floating_point() or not a.is_floating_point():
                raise ValueError(f"factor {position}: {b.dtype} and {a.dtype} are not floating")
            scales.append(_scale_vector(scale, b.shape[1], position, b.device))
            left.append(b.detach())
            right.append(a.detach().T)
        return cls(left, right, torch.cat(scales))


def _scale_vector(scale: Scale, rank: int, position: int, device: torch.device) -> torch.Tensor:
    vector = torch.as_tensor(scale, dtype=torch.float64, device=device).detach()
    if vector.dim() == 0:
        return vector.repeat(rank)
    if vector.shape != (rank,):
        raise ValueError(f"factor {position}: scale {list(vector.shape)} is not [{rank}]")
    return vector


def _by_qr(stack: _Stack, rank: int | None, energy: float | None) -> Decomposition:
    """Decompose by Householder QR; Q is applied as reflections, not formed. Returns U, sigma, V."""
    left, left_tau, left_r = _householder(stack.left, stack.m)
    right, right_tau, right_r = _householder(stack.right, stack.n)
    core = (left_r * stack.scale) @ right_r.T
    core_u, sigma, core_v = _core_svd(core, rank, energy)
    u = _apply_reflections(left, left_tau, core_u, stack.m)
    del left  # its memory serves the other side
    v = _apply_reflections(right, right_tau, core_v, stack.n)
    return u, sigma, v


def _householder(
    parts: list[torch.Tensor], rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the packed reflections [rows, R], their tau, and the factor R [min(rows, R), R]."""
    columns = sum(part.shape[1] for part in parts)
    joined = parts[0].new_empty(columns, rows, dtype=torch.float64).T  # LAPACK's column order
    _join(parts, joined)
    tau = joined.new_empty(min(rows, columns))
    torch.geqrf(joined, out=(joined, tau))  # in place: no second copy of the stack
    return joined, tau, joined[: min(rows, columns)].triu()


def _apply_reflections(
    packed: torch.Tensor, tau: torch.Tensor, core: torch.Tensor, rows: int
) -> torch.Tensor:
    """Return Q @ core as float32 [rows, k]."""
    result = core.new_zeros(core.shape[1], rows).T
    result[: core.shape[0]] = core
    torch.ormqr(packed[:, : tau.numel()], tau, result, out=result)
    return result.to(torch.float32)


def _by_gram(stack: _Stack, rank: int | None, energy: float | None) -> Decomposition | None:
    """Decompose through R x R Gram matrices; None where the result would not be accurate."""
    left_norm, left_root = _cholesky(stack.left)
    right_norm, right_root = _cholesky(stack.right)
    if left_root is None or right_root is None:
        return None
    core = (left_root.T * (stack.scale * left_norm * right_norm)) @ right_root
    core_u, sigma, core_v = _core_svd(core, rank, energy)
    u = _product(stack.left, left_norm, left_root, core_u)
    v = _product(stack.right, right_norm, right_root, core_v)
    return u, sigma, v


def _cholesky(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the column norms [R] and L [R, R], L L^T the Gram matrix of the unit columns.

    Unit columns first: scales that differ by orders of magnitude between nodes are harmless then.
    L is None where the columns are too close to dependent, and where they are not finite.
    """
    columns = sum(part.shape[1] for part in parts)
    gram = parts[0].new_zeros(columns, columns, dtype=torch.float64)
    for rows in _blocks(parts):
        gram.addmm_(rows.T, rows)
    norm = gram.diagonal().sqrt()
    root, failed = torch.linalg.cholesky_ex(gram / norm / norm[:, None])
    if failed:
        return norm, None
    inverse = torch.linalg.solve_triangular(root, torch.eye(columns).to(root), upper=False)
    condition = columns * inverse.square().sum()  # at least ||G|| ||G^-1||, for tr G = R
    return norm, root if condition <= CONDITION_LIMIT else None


def _product(
    parts: list[torch.Tensor], norm: torch.Tensor, root: torch.Tensor, core: torch.Tensor
) -> torch.Tensor:
    """Return Q @ core as float32 [rows, k], Q the unit columns times the inverse of L^T."""
    mapping = torch.linalg.solve_triangular(root.T, core, upper=True) / norm[:, None]
    result = parts[0].new_empty(parts[0].shape[0], mapping.shape[1], dtype=torch.float32)
    start = 0
    for rows in _blocks(parts):
        result[start : start + rows.shape[0]] = rows @ mapping
        start += rows.shape[0]
    return result


def _blocks(parts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the joined parts in float64, some rows at a time, so that no whole copy exists.

    All blocks share one buffer: each is valid until the next.
    """
    count, columns = parts[0].shape[0], sum(part.shape[1] for part in parts)
    buffer = parts[0].new_empty(min(ROWS_AT_ONCE, count), columns, dtype=torch.float64)
    for start in range(0, count, ROWS_AT_ONCE):
        rows = buffer[: min(ROWS_AT_ONCE, count - start)]
        _join(parts, rows, start)
        yield rows


def _join(parts: list[torch.Tensor], joined: torch.Tensor, start: int = 0) -> None:
    """Write rows start, start + 1, ... of the parts side by side into `joined`."""
    column = 0
    for part in parts:
        rows = part[start : start + joined.shape[0]]
        joined[:, column : column + part.shape[1]] = rows
        column += part.shape[1]


def _core_svd(core: torch.Tensor, rank: int | None, energy: float | None) -> Decomposition:
    """Return U [p, k], sigma [k], V [q, k] of the core [p, q], truncated as asked for."""
    if not torch.isfinite(core).all():
        raise ValueError("the factors are not finite, or their product overflows")
    u, sigma, vt = torch.linalg.svd(core, full_matrices=False)
    kept = _kept(sigma, rank, energy)
    return u[:, :kept], sigma[:kept].clone(), vt[:kept].T


def _kept(sigma: torch.Tensor, rank: int | None, energy: float | None) -> int:
    """Return how many leading singular values to keep."""
    if sigma.numel() == 0 or sigma[0] == 0:
        return 0
    squared = (sigma / sigma[0]).square()
    # the tail is summed from its small end: subtracting from the total would cancel
    tail = squared.flip(0).cumsum(0).flip(0)  # tail[i] = sum of squared[i:]
    kept = int((tail > ROUNDING**2 * tail[0]).sum())
    if energy is not None:
        head = squared.cumsum(0)
        kept = min(kept, 1 + int((head < energy * head[-1]).sum()))
    if rank is not None:
        kept = min(kept, rank)
    return kept
