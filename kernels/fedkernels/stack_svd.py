"""The singular value decomposition of a sum of low-rank products, without ever forming the sum.

A sum of products sum_i B_i diag(s_i) A_i is one stack B S A: B [m, R], A [R, n], S diagonal.
Its decomposition follows from that of a small core, in one of two ways:

    qr      B = Q_b R_b and A^T = Q_a R_a by Householder reflections; the core is R_b S R_a^T.
    gram    B^T B = V_b L_b V_b^T and A A^T = V_a L_a V_a^T; the core is the product
            L_b^1/2 V_b^T S V_a L_a^1/2. Matrix products only, hence faster; but squaring the
            condition number loses directions, so this path measures what it lost and gives way to
            qr where that would show in a float32 result.

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

# Smallest eigenvalue, relative to the largest, from which the Gram path still gives singular
# vectors that are orthogonal to float32 precision (their error is 2**-52 over this).
GRAM_CUTOFF = 1e-8

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
        method: "qr", "gram" or "auto" (gram where the stack is thin, else qr).

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
    start = 0
    for part in parts:
        joined[:, start : start + part.shape[1]] = part
        start += part.shape[1]
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
    left_norm, left_values, left_vectors = _gram_eigen(stack.left)
    right_norm, right_values, right_vectors = _gram_eigen(stack.right)
    weight = stack.scale * left_norm * right_norm
    if not torch.isfinite(weight).all():
        return None
    # coordinates of the sum in the eigenvectors of both sides, before scaling by the roots
    middle = left_vectors.T @ (weight[:, None] * right_vectors)
    left_root, right_root = left_values.clamp(min=0).sqrt(), right_values.clamp(min=0).sqrt()
    left_keep, right_keep = _well_conditioned(left_values), _well_conditioned(right_values)
    core = left_root[left_keep, None] * middle[left_keep][:, right_keep] * right_root[right_keep]
    # ||B v|| of a dropped eigenvector is measured on B itself: its eigenvalue is only noise
    left_lost = _norms(stack.left, left_norm, left_vectors[:, ~left_keep])
    right_lost = _norms(stack.right, right_norm, right_vectors[:, ~right_keep])
    lost = left_lost[:, None] * middle[~left_keep] * right_root
    lost_too = left_root[:, None] * middle[:, ~right_keep] * right_lost
    lost_twice = left_lost[:, None] * middle[~left_keep][:, ~right_keep] * right_lost
    missing = lost.norm() + lost_too.norm() + lost_twice.norm()
    if missing > ROUNDING / 4 * core.norm():
        return None
    core_u, sigma, core_v = _core_svd(core, rank, energy)
    left_map = left_vectors[:, left_keep] @ (core_u / left_root[left_keep, None])
    right_map = right_vectors[:, right_keep] @ (core_v / right_root[right_keep, None])
    u = _product(stack.left, left_norm, left_map)
    v = _product(stack.right, right_norm, right_map)
    return u, sigma, v


def _gram_eigen(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return column norms [R], and eigenvalues [R] and -vectors [R, R] of the unit columns' Gram.

    Unit columns first: scales that differ by orders of magnitude between nodes are harmless then.
    """
    columns = sum(part.shape[1] for part in parts)
    gram = parts[0].new_zeros(columns, columns, dtype=torch.float64)
    for rows in _blocks(parts):
        gram.addmm_(rows.T, rows)
    norm = gram.diagonal().sqrt()
    norm = torch.where(norm == 0, 1.0, norm)
    if not torch.isfinite(gram).all():
        return norm.fill_(torch.nan), norm, gram
    values, vectors = torch.linalg.eigh(gram / norm / norm[:, None])
    return norm, values, vectors


def _well_conditioned(values: torch.Tensor) -> torch.Tensor:
    if values.numel() == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    return (values > GRAM_CUTOFF * values.max()) & (values > 0)


def _norms(parts: list[torch.Tensor], norm: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return the norms [d] of the unit-column stack times `vectors` [R, d]."""
    squared = vectors.new_zeros(vectors.shape[1])
    if vectors.shape[1]:
        for rows in _blocks(parts):
            squared += ((rows / norm) @ vectors).square_().sum(dim=0)
    return squared.sqrt()


def _product(parts: list[torch.Tensor], norm: torch.Tensor, mapping: torch.Tensor) -> torch.Tensor:
    """Return the unit-column stack times `mapping` [R, k] as float32 [rows, k]."""
    mapping = mapping / norm[:, None]
    result = parts[0].new_empty(parts[0].shape[0], mapping.shape[1], dtype=torch.float32)
    start = 0
    for rows in _blocks(parts):
        result[start : start + rows.shape[0]] = rows @ mapping
        start += rows.shape[0]
    return result


def _blocks(parts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the joined parts in float64, some rows at a time, so that no whole copy exists."""
    for start in range(0, parts[0].shape[0], ROWS_AT_ONCE):
        stop = start + ROWS_AT_ONCE
        yield torch.cat([part[start:stop].to(torch.float64) for part in parts], dim=1)


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
