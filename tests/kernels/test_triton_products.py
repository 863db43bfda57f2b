"""Triton's products with signs and with quantised matrices, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedkernels as fk
from fedkernels.gpu import quantized as gpu_quantized
from fedkernels.gpu import sign_adapter as gpu_signs
from fedkernels.quantized_tensor import QuantizedTensor
from fedkernels.reference import quantized as quantized_truth
from fedkernels.reference import sign_adapter as sign_truth

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = st.integers(1, 150)
SEEDS = st.integers(0, 2**64 - 1)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
few = settings(max_examples=12)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def relative_error(measured: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (measured.cpu().double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


@few
@given(st.lists(SEEDS, min_size=1, max_size=70), st.integers(0, 2**64 - 2), SIZES, SIZES)
def test_factors_and_their_transposes_have_the_bits_of_the_reference(seeds, tensor_id, out, inner):
    left, right = gpu_signs.factors(seeds, tensor_id, out, inner, DEVICE)
    expected_left, expected_right = sign_truth.factors(seeds, tensor_id, out, inner)
    assert torch.equal(left.cpu(), expected_left)
    assert torch.equal(right.cpu(), expected_right)
    assert torch.equal(gpu_signs.transpose(left).cpu(), sign_truth.transpose(expected_left))


@few
@given(st.integers(1, 90), SIZES, SIZES, DTYPES, st.booleans())
def test_a_product_with_signs_is_the_dense_one(rows, inner, columns, dtype, adds):
    words = sign_truth.pack((values(inner, columns) > 0).long())
    x, scale = values(rows, inner, dtype=dtype), values(columns)
    add = values(rows, columns, dtype=dtype) if adds else None
    expected = x.double() @ sign_truth.signs(words, inner, columns).double() * scale.double()
    if add is not None:
        expected = expected + add.double()
    moved = [None if t is None else t.to(DEVICE) for t in (scale, add)]
    coarse = dtype == torch.bfloat16
    measured = gpu_signs.product(
        x.to(DEVICE), words.to(DEVICE), columns, *moved, dtype=dtype, coarse=coarse
    )
    assert measured.dtype == dtype
    assert relative_error(measured, expected) < TOLERANCE[dtype]


def matrices() -> st.SearchStrategy[QuantizedTensor]:
    return st.builds(
        lambda out, inner, fmt: quantized_truth.quantize(values(out, inner), fmt),
        SIZES,
        SIZES,
        st.sampled_from(["nf4", "int4", "int8"]),
    )


@few
@given(matrices(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_dequantised_matrices_have_the_bits_of_the_reference(matrix, dtype):
    measured = gpu_quantized.dequantize(matrix.to(DEVICE), dtype).cpu()
    assert torch.equal(measured, quantized_truth.dequantize(matrix).to(dtype))


@few
@given(matrices(), st.sampled_from([1, 5, 40, 70]), DTYPES, st.booleans())
def test_quantised_products_are_those_of_the_dequantised_matrix(matrix, rows, dtype, biased):
    out, inner = matrix.shape
    moved = matrix.to(DEVICE)
    x, dy = values(rows, inner, dtype=dtype), values(rows, out, dtype=dtype)
    bias = values(out) if biased else None
    y = gpu_quantized.linear(x.to(DEVICE), moved, None if bias is None else bias.to(DEVICE))
    dx = gpu_quantized.linear_backward(dy.to(DEVICE), moved)
    dense = quantized_truth.dequantize(matrix).double()
    expected = x.double() @ dense.T + (0 if bias is None else bias.double())
    assert y.dtype == dx.dtype == dtype
    assert relative_error(y, expected) < TOLERANCE[dtype]
    assert relative_error(dx, dy.double() @ dense) < TOLERANCE[dtype]


@pytest.fixture
def triton():
    """The backend in use, so that the public functions take tensors on the CPU to it."""
    before = fk.backend()
    fk.use_backend("triton")
    yield
    fk.use_backend(before)


def test_the_sign_adapter_is_differentiable(triton):
    coefficients = values(5).to(DEVICE).requires_grad_()
    adapter = fk.SignAdapter.from_seeds([3, 1, 4, 1, 5], coefficients, 7, (33, 40))
    u, v = (factor.to(DEVICE) for factor in adapter.factors())
    x = values(6, 40).to(DEVICE).requires_grad_()
    y = values(6, 33).to(DEVICE).requires_grad_()
    expected = y + ((x @ v.T) * coefficients) @ u
    given = fk.sign_linear(x, adapter, y)
    torch.testing.assert_close(given, expected)
    direction = values(6, 33).to(DEVICE)
    for mine, theirs in zip(
        torch.autograd.grad(given, (x, coefficients, y), direction),
        torch.autograd.grad(expected, (x, coefficients, y), direction),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("fmt", ["nf4", "int4", "int8"])
def test_a_quantised_layer_with_its_adapter_is_differentiable(triton, fmt):
    matrix = fk.quantize(values(48, 64).to(DEVICE), fmt)
    leaves = [values(*shape).to(DEVICE).requires_grad_() for shape in ((9, 64), (4, 64), (48, 4))]
    x, a, b = leaves
    given = fk.lora_linear(x, matrix, a, b, 0.5)
    expected = x @ (matrix.dequantize() + 0.5 * b @ a).T
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-5)
    direction = values(9, 48).to(DEVICE)
    for mine, theirs in zip(
        torch.autograd.grad(given, leaves, direction),
        torch.autograd.grad(expected, leaves, direction),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)
