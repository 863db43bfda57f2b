"""The sign adapter is the sum of rank-1 probes that its seeds name, applied and differentiated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fedkernels as fk
from fedkernels.backends import cpu_backends
from fedkernels.reference import probes
from fedkernels.reference import sign_adapter as reference

SEEDS = st.integers(0, 2**64 - 1)
TENSOR_IDS = st.integers(0, 2**64 - 2)
EXACT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative to the norm of the result
DTYPES = pytest.mark.parametrize("dtype", EXACT)

# The fixture only selects a backend: it carries nothing from one example to the next.
every_backend = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30
)

# rows, out, in and K: ragged ones, and such as fill vectors, tiles and a task's columns
SIZES = st.tuples(st.integers(1, 19), st.integers(1, 150), st.integers(1, 300), st.integers(1, 150))
LARGE_SIZES = (11, 1100, 1061, 300)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread but where threads are the subject: small dense products wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def from_seeds(count: int, coefficients: torch.Tensor, out: int, inner: int) -> fk.SignAdapter:
    """Return an adapter that the fastest backend packed: all pack the same words."""
    before = fk.backend()
    fk.use_backend(cpu_backends()[-1])
    adapter = fk.SignAdapter.from_seeds(range(count), coefficients, 7, (out, inner))
    fk.use_backend(before)
    return adapter


def adapter_of(out: int, inner: int, count: int) -> fk.SignAdapter:
    return from_seeds(count, normal(count, seed=2), out, inner)


def dense(adapter: fk.SignAdapter) -> torch.Tensor:
    """Return the whole change in float64."""
    u, v = adapter.factors()
    return (u.T.double() * adapter.coefficients.detach()) @ v.double()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@every_backend
@given(seeds=st.lists(SEEDS, min_size=1, max_size=5), tensor_id=TENSOR_IDS, sizes=SIZES)
@example(seeds=list(range(40)), tensor_id=2**40, sizes=(1, 130, 50, 1))
def test_every_backend_packs_the_words_of_the_reference(backend, seeds, tensor_id, sizes):
    _, out, inner, _ = sizes
    adapter = fk.SignAdapter.from_seeds(seeds, torch.ones(len(seeds)), tensor_id, (out, inner))
    left, right = reference.factors(seeds, tensor_id, out, inner)
    assert torch.equal(adapter.left, left)
    assert torch.equal(adapter.right, right)


def test_a_factor_is_the_stream_that_the_definition_names(backend):
    seed, tensor_id = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    adapter = fk.SignAdapter.from_seeds([1, seed], torch.ones(2), tensor_id, (200, 3, 100))
    u, v = adapter.factors()
    for factor, upper in ((u[1], 0x80000000), (v[1], 0xC0000000)):
        for i, value in enumerate(factor.tolist()):
            counter = (i // 128, upper, 0x76543210, 0xFEDCBA98)
            words = probes.philox4x32(counter, (0x89ABCDEF, 0x01234567))
            assert value == (-1.0 if words[i // 32 % 4] >> i % 32 & 1 else 1.0)
    assert (u.shape, v.shape, adapter.dense().shape) == ((2, 200), (2, 300), (200, 300))


@every_backend
@given(
    seeds=st.lists(SEEDS, min_size=1, max_size=5),
    tensor_id=TENSOR_IDS,
    out=st.integers(1, 40),
    inner=st.integers(1, 150),
)
def test_it_is_the_sum_of_the_probes_that_its_seeds_name(backend, seeds, tensor_id, out, inner):
    # integers, so that the sum is exact in any order
    coefficients = torch.arange(3, 3 + len(seeds), dtype=torch.float32)
    adapter = fk.SignAdapter.from_seeds(seeds, coefficients, tensor_id, (out, inner))
    expected = torch.zeros(out, inner)
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        expected += coefficient * fk.noise(seed, tensor_id, (out, inner), "rank1")
    assert torch.equal(adapter.dense(), expected)


@DTYPES
@every_backend
@given(sizes=SIZES, with_y=st.booleans())
@example(sizes=LARGE_SIZES, with_y=True)
def test_it_equals_the_dense_product(backend, dtype, sizes, with_y):
    rows, out, inner, count = sizes
    adapter = adapter_of(out, inner, count)
    x, y = normal(rows, inner).to(dtype), normal(rows, out, seed=3).to(dtype)
    expected = x.double() @ dense(adapter).T + (y.double() if with_y else 0)
    found = adapter(x, y if with_y else None)
    assert (found.dtype, found.shape) == (dtype, (rows, out))
    # relative to the norm that random signs give on average, for a few numbers may cancel
    average = x.norm() * adapter.coefficients.norm() * out**0.5 + (y.norm() if with_y else 0)
    assert (found - expected).norm() < EXACT[dtype] * average
    if with_y:
        memory = y.data_ptr()
        assert torch.equal(adapter.add_(x, y), found)
        assert y.data_ptr() == memory


@DTYPES
@every_backend
@given(sizes=SIZES)
@example(sizes=LARGE_SIZES)
def test_gradients_equal_those_of_the_dense_product(backend, dtype, sizes):
    rows, out, inner, count = sizes
    adapter = adapter_of(out, inner, count)
    a = adapter.coefficients.clone().requires_grad_()
    x = normal(rows, inner).to(dtype).requires_grad_()
    y = normal(rows, out, seed=3).to(dtype).requires_grad_()
    direction = normal(rows, out, seed=4).to(dtype)
    fk.sign_linear(x, replace(adapter, coefficients=a), y).backward(direction)

    u, v = (factor.double() for factor in adapter.factors())
    q = direction.double() @ u.T
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert a.grad is not None
    average = direction.norm() * a.norm() * inner**0.5
    assert (x.grad - (q * a) @ v).norm() < EXACT[dtype] * average
    average = (x.norm(dim=1) * direction.norm(dim=1)).norm() * count**0.5
    assert (a.grad - (x.double() @ v.T * q).sum(0)).norm() < EXACT[dtype] * average
    assert torch.equal(y.grad, direction)


def test_the_gradient_check_of_torch_passes(backend):
    adapter = adapter_of(5, 6, 3)
    arguments = [normal(*shape).double().requires_grad_() for shape in ((2, 6), (3,), (2, 5))]

    def apply(x, a, y):
        return fk.sign_linear(x.float(), replace(adapter, coefficients=a.float()), y.float())

    # linear in each argument, so that large steps are right too
    assert torch.autograd.gradcheck(apply, arguments, eps=0.25, atol=1e-4)


@every_backend
@given(sizes=SIZES, exponent=st.integers(-20, 20))
def test_it_is_linear_in_the_coefficients(backend, sizes, exponent):
    rows, out, inner, count = sizes
    x = normal(rows, inner)
    first, second = normal(count, seed=5), normal(count, seed=6)
    adapter = from_seeds(count, first, out, inner)
    a, b = adapter(x), replace(adapter, coefficients=second)(x)
    both = replace(adapter, coefficients=first + second)(x)
    average = x.norm() * (first.norm() + second.norm()) * out**0.5
    assert (both - a - b).norm() <= 1e-5 * average
    # a power of two rounds nothing
    scaled = replace(adapter, coefficients=torch.ldexp(first, torch.tensor(exponent)))(x)
    assert torch.equal(scaled, a * 2.0**exponent)


def test_integer_coefficients_are_multiples_of_the_power_of_two(backend):
    coefficients = torch.tensor([3, -5, 2**31 - 1], dtype=torch.int32)
    adapter = fk.SignAdapter.from_seeds([1, 2, 3], coefficients, 0, (4, 5), exponent=-7)
    assert adapter.coefficients.tolist() == [3 / 128, -5 / 128, 2.0**24]


@settings(max_examples=30)
@given(sizes=SIZES, threads=st.integers(1, 5))
@example(sizes=LARGE_SIZES, threads=3)
def test_compiled_backends_give_the_same_bits_on_any_number_of_threads(sizes, threads):
    rows, out, inner, count = sizes
    adapter = adapter_of(out, inner, count)
    x = normal(rows, inner)
    before = fk.backend()
    results = []
    try:
        for name in cpu_backends()[1:]:
            fk.use_backend(name)
            torch.set_num_threads(threads)
            results.append(adapter(x))
            torch.set_num_threads(1)
            results.append(adapter(x))
    finally:
        fk.use_backend(before)
        torch.set_num_threads(1)
    assert all(torch.equal(result, results[0]) for result in results)


@DTYPES
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20])
def test_tiny_and_huge_numbers_keep_their_precision(backend, dtype, size):
    adapter = adapter_of(40, 300, 20)
    x = (normal(9, 300) * size).to(dtype)
    assert error(adapter(x), x.double() @ dense(adapter).T) < EXACT[dtype]


@DTYPES
def test_outliers_cost_no_precision_beyond_their_norm(backend, dtype):
    adapter = adapter_of(40, 1000, 90)
    x = normal(9, 1000)
    x[:, ::250] *= 1e4
    x = x.to(dtype)
    assert error(adapter(x), x.double() @ dense(adapter).T) < EXACT[dtype]


@DTYPES
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_poisons_its_row_alone(backend, dtype, poison):
    adapter = adapter_of(40, 70, 20)
    x = normal(9, 70).to(dtype)
    clean = adapter(x)
    x[4, 33] = poison
    spoilt = adapter(x)
    assert not spoilt[4].isfinite().any()
    others = torch.arange(9) != 4
    assert torch.equal(spoilt[others], clean[others])


def test_zeros_give_zeros(backend):
    adapter = adapter_of(40, 70, 20)
    for dtype in EXACT:
        assert not adapter(torch.zeros(3, 70, dtype=dtype)).any()


def test_leading_dimensions_are_rows(backend):
    adapter = adapter_of(40, 70, 20)
    x, y = normal(2, 3, 5, 70), normal(2, 3, 5, 40, seed=3)
    assert torch.equal(adapter(x, y), adapter(x.reshape(30, 70), y.reshape(30, 40)).view(y.shape))
    assert adapter(normal(70)).shape == (40,)


def test_a_gradient_that_is_not_contiguous_is_the_same(backend):
    adapter = adapter_of(40, 70, 20)
    gradients = []
    for make in (torch.ones, lambda *shape: torch.ones(1).expand(shape)):
        x = normal(3, 70).requires_grad_()
        adapter(x).backward(make(3, 40))
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_it_takes_a_sixteenth_of_its_factors_memory():
    adapter = adapter_of(1024, 1024, 256)
    assert adapter.nbytes <= sum(factor.nbytes for factor in adapter.factors()) / 16


ADAPTER = adapter_of(4, 6, 2)
X, Y = torch.ones(3, 6), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((X.double(),), "x must be float32"),
        ((X.to("meta"),), "x must be on cpu"),
        ((torch.ones(3, 5),), "x must be"),
        ((torch.ones(()),), "x must be"),
        ((torch.ones(0, 6),), "x must not be empty"),
        ((torch.ones(6, 3).T,), "x must be contiguous"),
        ((X, Y.bfloat16()), "y must have the dtype"),
        ((X, torch.ones(2, 4)), "y must have the dtype and the rows"),
        ((X, torch.ones(3, 5)), "y must be"),
        ((X, torch.ones(4, 3).T), "y must be contiguous"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(backend, arguments, named):
    with pytest.raises(ValueError, match=named):
        fk.sign_linear(arguments[0], ADAPTER, *arguments[1:])


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([], torch.ones(0), 0, (4, 6)), "seeds"),
        (([-1], ONE, 0, (4, 6)), "seeds"),
        (([2**64], ONE, 0, (4, 6)), "seeds"),
        (([1, 2], ONE, 0, (4, 6)), "coefficients"),
        (([1], ONE.double(), 0, (4, 6)), "coefficients"),
        (([1], ONE.to("meta"), 0, (4, 6)), "coefficients"),
        (([1, 2], torch.ones(4)[::2], 0, (4, 6)), "coefficients"),
        (([1], ONE * torch.nan, 0, (4, 6)), "coefficients"),
        (([1], ONE, 0, (4, 6), 200), "coefficients"),
        (([1], ONE, 0, (4, 6), 2**40), "exponent"),
        (([1], ONE, -1, (4, 6)), "tensor_id"),
        (([1], ONE, 2**64 - 1, (4, 6)), "tensor_id"),
        (([1], ONE, 0, (4,)), "shape"),
        (([1], ONE, 0, (0, 6)), "shape"),
        (([1], ONE, 0, (4, 2**40)), "shape"),
    ],
)
def test_what_names_no_adapter_is_refused_by_name(backend, arguments, named):
    with pytest.raises(ValueError, match=named):
        fk.SignAdapter.from_seeds(*arguments)
