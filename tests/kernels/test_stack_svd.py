"""stack_svd equals the SVD of the dense sum, and truncates optimally, without forming the sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fedkernels as fk

METHODS = pytest.mark.parametrize("method", fk.METHODS)
# far from where the squares of this file's own checks underflow
SCALES = st.just(0.0) | st.floats(1e-9, 4.0) | st.floats(-4.0, -1e-9)
ROUNDING = 1e-6  # of a float32 result, relative to the norm of the sum


@st.composite
def stacks(draw):
    """Draw factors of random sizes, dtypes and scales; ranks may be 0 and may exceed m and n."""
    m, n = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    ranks = draw(st.lists(st.integers(0, 8), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    factors = []
    for rank in ranks:
        b = torch.randn(m, rank, generator=generator).to(dtype)
        a = torch.randn(rank, n, generator=generator).to(dtype)
        scale = draw(SCALES)
        if draw(st.booleans()):
            scale = scale * torch.randn(rank, generator=generator)
        factors.append((b, a, scale))
    return factors


def dense(factors):
    total = 0
    for b, a, scale in factors:
        total = total + (b.double() * torch.as_tensor(scale, dtype=torch.float64)) @ a.double()
    return total


def product(decomposition):
    u, sigma, vt = decomposition
    return (u.double() * sigma) @ vt.double()


def identity_error(columns):
    gram = columns.double().T @ columns.double()
    return (gram - torch.eye(len(gram))).abs().max().item() if len(gram) else 0.0


@METHODS
@given(factors=stacks())
def test_it_is_the_singular_value_decomposition_of_the_sum(method, factors):
    expected = dense(factors)
    u, sigma, vt = fk.stack_svd(factors, method=method)
    assert (u.dtype, sigma.dtype, vt.dtype) == (torch.float32, torch.float64, torch.float32)
    assert (u.shape[0], vt.shape[1]) == expected.shape
    assert u.shape[1] == len(sigma) == vt.shape[0] <= min(expected.shape)
    assert (product((u, sigma, vt)) - expected).norm() <= ROUNDING * expected.norm()
    assert identity_error(u) < ROUNDING
    assert identity_error(vt.T) < ROUNDING
    assert torch.equal(sigma, sigma.sort(descending=True).values)
    assert (sigma > 0).all()
    exact = torch.linalg.svdvals(expected)[: len(sigma)]
    assert torch.allclose(sigma, exact, rtol=0, atol=ROUNDING * expected.norm().item())


@METHODS
@given(factors=stacks(), rank=st.integers(0, 25))
def test_a_rank_limit_truncates_optimally(method, factors, rank):
    expected = dense(factors)
    result = fk.stack_svd(factors, rank=rank, method=method)
    assert len(result[1]) <= rank
    optimum = torch.linalg.svdvals(expected)[rank:].norm()
    error = (product(result) - expected).norm()
    assert error <= (1 + 1e-4) * optimum + ROUNDING * expected.norm()


@METHODS
@given(factors=stacks(), energy=st.floats(0.01, 0.999999))
def test_an_energy_limit_keeps_the_fewest_directions_that_hold_it(method, factors, energy):
    sigma = fk.stack_svd(factors, method=method)[1]
    kept = len(fk.stack_svd(factors, energy=energy, method=method)[1])
    held = sigma.square().cumsum(0)
    assert kept == 0 if len(sigma) == 0 else held[kept - 1] >= energy * held[-1] * (1 - 1e-12)
    assert kept <= 1 or held[kept - 2] < energy * held[-1] * (1 + 1e-12)
    assert len(fk.stack_svd(factors, energy=energy, rank=2, method=method)[1]) == min(kept, 2)


@METHODS
def test_equal_directions_are_counted_exactly(method):
    eye = torch.eye(16)[:, :10]
    assert len(fk.stack_svd([(eye, eye.T, 1.0)], energy=0.9, method=method)[1]) == 9
    assert len(fk.stack_svd([(eye, eye.T, 1.0)], energy=1.0, method=method)[1]) == 10


@METHODS
@given(factors=stacks())
def test_the_largest_entry_of_a_left_vector_is_positive(method, factors):
    u, _, _ = fk.stack_svd(factors, method=method)
    assert all(column[column.abs().argmax()] > 0 for column in u.T)


@METHODS
@given(factors=stacks())
def test_a_repeated_summand_adds_no_direction_and_its_opposite_leaves_nothing(method, factors):
    once = fk.stack_svd(factors, method=method)
    twice = fk.stack_svd([*factors, *factors], method=method)
    assert len(twice[1]) == len(once[1])
    assert torch.allclose(twice[1], 2 * once[1])
    opposite = [(b, a, -scale) for b, a, scale in factors]
    nothing = fk.stack_svd([*factors, *opposite], method=method)
    scale = once[1][0] if len(once[1]) else 1.0
    assert not len(nothing[1]) or nothing[1][0] < 1e-10 * scale


@METHODS
@pytest.mark.parametrize("rank", [None, 3])
def test_a_zero_sum_has_no_directions(method, rank):
    zero = [(torch.zeros(5, 2), torch.ones(2, 4), 1.0), (torch.ones(5, 3), torch.ones(3, 4), 0.0)]
    u, sigma, vt = fk.stack_svd(zero, rank=rank, method=method)
    assert (u.shape, sigma.shape, vt.shape) == ((5, 0), (0,), (0, 4))


@METHODS
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6, 1e-8])
def test_almost_parallel_factors_lose_nothing(method, distance):
    generator = torch.Generator().manual_seed(3)
    b, noise = torch.randn(2, 60, 4, dtype=torch.float64, generator=generator)
    a, other = torch.randn(2, 4, 50, dtype=torch.float64, generator=generator)
    factors = [(b, a, 1.0), (b + distance * noise, other, -1.0)]
    u, sigma, vt = fk.stack_svd(factors, method=method)
    expected = dense(factors)
    assert (product((u, sigma, vt)) - expected).norm() <= ROUNDING * expected.norm()
    assert identity_error(u) < ROUNDING
    assert identity_error(vt.T) < ROUNDING


@METHODS
def test_factors_of_very_unlike_size_keep_their_directions(method):
    generator = torch.Generator().manual_seed(4)
    b = torch.randn(40, 6, generator=generator)
    a = torch.randn(6, 30, generator=generator)
    size = torch.tensor([1e12, 1e-12, 1e6, 1.0, 1e-6, 1e3], dtype=torch.float64)
    scaled = [(b.double() * size, a.double() / size[:, None], 2.0)]
    assert torch.allclose(
        fk.stack_svd(scaled, method=method)[1], fk.stack_svd([(b, a, 2.0)], method=method)[1]
    )


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@METHODS
def test_the_sum_is_never_formed(method):
    m, n, ranks = 900, 700, [8, 4, 2]
    factors = [(torch.randn(m, r), torch.randn(r, n), 1.0) for r in ranks]
    with LargestTensor() as largest:
        fk.stack_svd(factors, rank=8, method=method)
    assert 0 < largest.elements <= max(m, n) * sum(ranks)


@METHODS
def test_the_result_does_not_share_memory_with_the_factors_or_change_them(method):
    b, a = torch.randn(30, 2, requires_grad=True), torch.randn(2, 20)
    kept = b.detach().clone(), a.clone()
    u, sigma, vt = fk.stack_svd([(b, a, 1.0)], method=method)
    assert not u.requires_grad
    for part in (u, sigma, vt):
        part.zero_()
    assert torch.equal(b, kept[0])
    assert torch.equal(a, kept[1])


B, A = torch.ones(4, 2), torch.ones(2, 3)


@METHODS
@pytest.mark.parametrize(
    ("factors", "limits", "named"),
    [
        ([], {}, "at least one"),
        ([(B, A.T, 1.0)], {}, "factor 0"),
        ([(B[0], A, 1.0)], {}, "factor 0"),
        ([(B, A, 1.0), (torch.ones(5, 2), A, 1.0)], {}, "factor 1"),
        ([(B, A, 1.0), (B, torch.ones(2, 2), 1.0)], {}, "factor 1"),
        ([(B, A, torch.ones(3))], {}, "scale"),
        ([(B.int(), A, 1.0)], {}, "floating"),
        ([(B * torch.nan, A, 1.0)], {}, "finite"),
        ([(B, A * torch.inf, 1.0)], {}, "finite"),
        ([(B, A, torch.nan)], {}, "finite"),
        ([(B, A, 1.0)], {"rank": -1}, "rank"),
        ([(B, A, 1.0)], {"energy": 0.0}, "energy"),
        ([(B, A, 1.0)], {"energy": 1.5}, "energy"),
    ],
)
def test_what_has_no_decomposition_is_refused_by_name(method, factors, limits, named):
    with pytest.raises(ValueError, match=named):
        fk.stack_svd(factors, **limits, method=method)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="divide"):
        fk.stack_svd([(B, A, 1.0)], method="divide")
