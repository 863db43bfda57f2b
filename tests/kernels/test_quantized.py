"""Quantised linears: near their weights, exact products, gradients of the dense layer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fedkernels as fk
from fedkernels import quantized_product as product
from fedkernels.reference import quantized as reference

FORMATS = ("nf4", "int4", "int8", "q4_0", "q4_1", "q8_0")
RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

# The fixture only selects a backend: it carries nothing from one example to the next.
every_backend = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12, deadline=None
)
SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 150)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(fmt: str, seed: int, out_features: int, in_features: int) -> fk.QuantizedTensor:
    """A matrix of any format; those of GGUF have in_features rounded up to their block of 32."""
    if fmt in ("nf4", "int4", "int8"):
        return fk.quantize(random(seed, out_features, in_features), fmt)
    width = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[fmt]
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, -(-in_features // 32), width)
    blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    blocks[..., 1] = blocks[..., 1] & 0xBF  # finite and below 2 in float16
    blocks[..., 3] = blocks[..., 3] & 0xBF
    return fk.QuantizedTensor.from_gguf(blocks.reshape(out_features, -1), fmt.upper())


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@every_backend
@given(st.sampled_from(["nf4", "int4", "int8"]), SEEDS, SIZES, SIZES, st.integers(-10, 4))
@example("nf4", 1, 300, 256, 0)  # more than one nested block
@example("int4", 1, 1, 1, 0)
def test_codes_and_scales_are_those_of_the_reference(
    backend, fmt, seed, out_features, in_features, exponent
):
    weight = random(seed, out_features, in_features) * 2.0**exponent
    ours, expected = fk.quantize(weight, fmt), reference.quantize(weight, fmt)
    for name, part in expected.parts().items():
        assert torch.equal(getattr(ours, name), part), name


@every_backend
@given(st.sampled_from(FORMATS), SEEDS, SIZES, SIZES)
@example("nf4", 1, 1, 1)
@example("q4_1", 1, 5, 160)
@example("int4", 2, 3, 4097)
def test_values_are_those_of_the_reference(backend, fmt, seed, out_features, in_features):
    tensor = quantized(fmt, seed, out_features, in_features)
    expected = reference.dequantize(tensor)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(tensor.dequantize(dtype), expected.to(dtype))


@every_backend
@given(SEEDS, st.integers(1, 20), SIZES)
def test_a_weight_is_near_its_value(backend, seed, out_features, in_features):
    weight = random(seed, out_features, in_features)
    absmax = weight.abs().amax(dim=1, keepdim=True)
    error = (fk.quantize(weight, "int8").dequantize() - weight).abs()
    assert (error <= absmax / 127 / 2 * (1 + 1e-5)).all()
    tensor = fk.quantize(weight, "int4")
    step = reference.spread(tensor.scales.float(), tensor.block, weight.numel())
    slack = weight.abs().max() * 2**-9  # scale and minimum have 11 bits
    error = (tensor.dequantize() - weight).abs().flatten()
    assert (error <= step / 2 + slack).all()
    if weight.numel() >= 64:
        nf4 = fk.quantize(weight, "nf4").dequantize()
        assert relative_error(nf4, weight) < 0.2


def test_zeros_and_constants_stay(backend):
    for fmt in ("nf4", "int4", "int8"):
        assert not fk.quantize(torch.zeros(3, 70), fmt).dequantize().any()
        constant = fk.quantize(torch.full((3, 70), -0.75), fmt).dequantize()
        assert torch.allclose(constant, torch.full((3, 70), -0.75), rtol=1e-6)


def test_bytes_of_a_large_matrix():
    weight = random(1, 512, 1024)
    bits = {fmt: fk.quantize(weight, fmt).nbytes * 8 / weight.numel() for fmt in FORMATS[:3]}
    assert bits["nf4"] < 4.16
    assert bits["int4"] == 4.5
    assert bits["int8"] < 8.04


@every_backend
@given(
    fmt=st.sampled_from(FORMATS),
    seed=SEEDS,
    rows=st.one_of(st.integers(1, 12), st.sampled_from([17, 32, 40, 130])),
    out_features=SIZES,
    in_features=st.one_of(SIZES, st.sampled_from([64, 128, 320])),  # whole blocks, or not
    dtype=st.sampled_from(list(RELATIVE_ERROR)),
    with_bias=st.booleans(),
)
@example("nf4", 1, 1, 64, 2048, torch.float32, False)
@example("nf4", 1, 8, 33, 576, torch.bfloat16, True)
@example("int8", 1, 8, 33, 577, torch.bfloat16, True)
@example("int4", 1, 7, 21, 1152, torch.bfloat16, True)
@example("int4", 1, 6, 21, 1152, torch.float32, False)
@example("nf4", 1, 32, 9, 64 * 257, torch.float32, False)  # nested blocks end inside a row
def test_product_and_gradients_are_those_of_the_dense_layer(
    backend, fmt, seed, rows, out_features, in_features, dtype, with_bias
):
    tensor = quantized(fmt, seed, out_features, in_features)
    weight = tensor.dequantize().double()
    x = random(seed + 1, rows, weight.shape[1]).to(dtype).requires_grad_()
    bias = random(seed + 2, out_features).requires_grad_() if with_bias else None
    dy = random(seed + 3, rows, out_features).to(dtype)

    y = fk.linear(x, tensor, bias)
    y.backward(dy)
    assert y.dtype == x.dtype
    product = x.detach().double() @ weight.T
    # Against the sum of magnitudes: a sum that cancels has no small error relative to itself.
    norm = product.norm() + (0 if bias is None else bias.detach().double().norm() * rows**0.5)
    expected = product if bias is None else product + bias.detach().double()
    assert (y.detach().double() - expected).norm() <= RELATIVE_ERROR[dtype] * norm
    assert relative_error(x.grad, dy.double() @ weight) <= RELATIVE_ERROR[dtype]
    if bias is not None:
        assert torch.allclose(bias.grad, dy.float().sum(dim=0), rtol=1e-5, atol=1e-5)


@every_backend
@given(
    fmt=st.sampled_from(["nf4", "int8"]),
    seed=SEEDS,
    rows=st.sampled_from([1, 5, 40]),
    rank=st.integers(1, 9),
    dtype=st.sampled_from(list(RELATIVE_ERROR)),
    adapter_dtype=st.sampled_from([torch.float32, None]),
    with_bias=st.booleans(),
)
def test_adapter_and_its_gradients_are_those_of_the_dense_layer(
    backend, fmt, seed, rows, rank, dtype, adapter_dtype, with_bias
):
    out_features, in_features, scale = 70, 90, 1.75
    tensor = quantized(fmt, seed, out_features, in_features)
    adapter_dtype = adapter_dtype or dtype
    x = random(seed + 1, rows, in_features).to(dtype).requires_grad_()
    a = random(seed + 2, rank, in_features).to(adapter_dtype).requires_grad_()
    b = random(seed + 3, out_features, rank).to(adapter_dtype).requires_grad_()
    bias = random(seed + 4, out_features).to(dtype).requires_grad_() if with_bias else None
    dy = random(seed + 5, rows, out_features).to(dtype)
    arguments = [x, a, b] + ([bias] if bias is not None else [])
    y = fk.lora_linear(x, tensor, a, b, scale, bias)
    gradients = torch.autograd.grad(y, arguments, dy)

    dense = [argument.detach().double().requires_grad_() for argument in arguments]
    weight = tensor.dequantize().double() + scale * dense[2] @ dense[1]
    expected = torch.nn.functional.linear(dense[0], weight, dense[3] if with_bias else None)
    assert relative_error(y.detach(), expected.detach()) <= RELATIVE_ERROR[dtype]
    dense_gradients = torch.autograd.grad(expected, dense, dy.double())
    for argument, gradient, dense_gradient in zip(
        arguments, gradients, dense_gradients, strict=True
    ):
        assert gradient.dtype == argument.dtype
        # Of rank 1 and one row x A^T is one number, which may cancel and keep its terms' rounding.
        cancelled = 8 if rows * rank == 1 else 2
        assert relative_error(gradient, dense_gradient) <= cancelled * RELATIVE_ERROR[dtype]


def test_autocast_changes_nothing(backend):
    tensor = quantized("nf4", 1, 20, 70)
    x, A, B = (
        random(i, *shape).requires_grad_() for i, shape in enumerate([(40, 70), (3, 70), (20, 3)])
    )

    def results():
        y = fk.lora_linear(x, tensor, A, B, 0.5) + fk.linear(x, tensor)
        return [y, *torch.autograd.grad(y.square().sum(), (x, A, B))]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("fmt", ["nf4", "int8", "q4_1"])
def test_panels_join_without_a_seam(backend, fmt, monkeypatch):
    tensor = quantized(fmt, 1, 200, 96)
    x, dy = random(2, 40, 96), random(3, 40, 200)
    y, dx = product.linear(x, tensor, None), product.linear_backward(dy, tensor)
    monkeypatch.setattr(product, "PANEL", 1000)
    monkeypatch.setattr(product, "LEAST_COLUMNS", 10)
    assert torch.allclose(product.linear(x, tensor, None), y, atol=1e-4)
    assert torch.allclose(product.linear_backward(dy, tensor), dx, atol=1e-4)


def test_a_nan_in_the_input_reaches_its_row_and_no_other(backend):
    tensor = quantized("nf4", 1, 30, 64)
    for dtype in RELATIVE_ERROR:
        x = random(2, 3, 64).to(dtype)
        x[1, 7] = torch.nan
        y = fk.linear(x, tensor)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_matter(backend, threads):
    tensor = quantized("nf4", 1, 512, 320)
    x = random(2, 5, 320)
    expected = fk.linear(x, tensor)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.allclose(fk.linear(x, tensor), expected, rtol=1e-6)
        assert torch.equal(tensor.dequantize(), reference.dequantize(tensor))
    finally:
        torch.set_num_threads(before)


def test_leading_dimensions_and_strides_of_the_input_do_not_matter(backend):
    tensor = quantized("nf4", 1, 30, 64)
    x = random(2, 64, 3, 5)
    expected = fk.linear(x.permute(1, 2, 0).reshape(15, 64), tensor)
    assert torch.equal(fk.linear(x.permute(1, 2, 0), tensor), expected.reshape(3, 5, 30))
    vector = x[:, 0, 0]
    assert fk.linear(vector, tensor).shape == (30,)
    assert torch.allclose(fk.linear(vector, tensor), expected[0], atol=1e-5)


def test_only_the_gradients_that_are_asked_for_are_there(backend):
    tensor = quantized("nf4", 1, 30, 64)
    a, b = random(1, 4, 64), random(2, 30, 4).requires_grad_()
    fk.lora_linear(random(3, 7, 64), tensor, a, b, 1.0).sum().backward()
    assert b.grad is not None
    assert a.grad is None


@pytest.mark.parametrize(
    ("weight", "fmt", "named"),
    [
        (torch.zeros(2, 3), "nf5", "fmt"),
        (torch.zeros(2, 3), "q4_0", "fmt"),
        (torch.zeros(2, 3, dtype=torch.int8), "nf4", "weight"),
        (torch.zeros(6), "nf4", "weight"),
        (torch.zeros(0, 3), "nf4", "weight"),
        (torch.full((2, 3), torch.nan), "nf4", "weight"),
        (torch.full((2, 3), 1e39, dtype=torch.float64), "int8", "weight"),
        (torch.full((2, 3), 1e5), "int4", "weight"),
        ([[1.0]], "nf4", "weight must be a tensor"),
        (torch.eye(3).to_sparse(), "nf4", "weight"),
        (torch.empty(2, 3, device="meta"), "nf4", "weight"),
        (torch._neg_view(torch.ones(2, 3)), "nf4", "weight"),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name(weight, fmt, named):
    with pytest.raises(ValueError, match=named):
        fk.quantize(weight, fmt)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float16)}, "x must"),
        ({"x": torch.zeros(2, 9)}, "x must"),
        ({"x": torch.zeros(0, 8)}, "x must"),
        ({"x": torch.tensor(1.0)}, "x must"),
        ({"x": torch.zeros(2, 8, device="meta")}, "x is on"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"bias": torch.zeros(4, dtype=torch.float64)}, "bias"),
        ({"A": torch.zeros(8)}, "A must"),
        ({"A": torch.zeros(0, 8)}, "A must"),
        ({"A": torch.zeros(3, 7)}, "A must"),
        ({"B": torch.zeros(4, 2)}, "B must"),
        ({"B": torch.zeros(4, 3, dtype=torch.float16)}, "B must"),
        ({"scale": math.nan}, "scale"),
        ({"scale": 1e300}, "scale"),
        ({"scale": "1"}, "scale"),
        ({"scale": torch.ones((), requires_grad=True)}, "scale"),
        ({"x": [1.0]}, "x must be a tensor"),
        ({"x": torch.zeros(2, 8).to_sparse()}, "x must"),
        ({"x": torch._neg_view(torch.zeros(2, 8))}, "x must"),
        ({"tensor": torch.zeros(4, 8)}, "tensor must be a QuantizedTensor"),
        ({"bias": 1.0}, "bias must be a tensor"),
        ({"bias": torch._neg_view(torch.zeros(4))}, "bias must"),
        ({"A": None}, "A must be a tensor"),
        ({"B": None}, "B must be a tensor"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_by_name(backend, changed, named):
    arguments = {
        "x": torch.zeros(2, 8),
        "tensor": fk.quantize(torch.zeros(4, 8), "nf4"),
        "A": torch.zeros(3, 8),
        "B": torch.zeros(4, 3),
        "scale": 1.0,
        "bias": None,
    }
    with pytest.raises(ValueError, match=named):
        fk.lora_linear(**(arguments | changed))


def test_a_dtype_that_holds_no_weights_is_refused(backend):
    with pytest.raises(ValueError, match="dtype"):
        fk.quantize(torch.zeros(4, 8), "nf4").dequantize(torch.int8)
