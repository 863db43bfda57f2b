"""Triton's probes have the bits of the reference: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import hashlib
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedkernels as fk
from fedkernels.gpu import probes as gpu
from fedkernels.part import Part
from fedkernels.probes import float32
from fedkernels.reference import probes as reference
from fedkernels.reference import replay as truth

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEEDS = st.integers(0, 2**64 - 1)
TENSOR_IDS = st.integers(0, 2**64 - 2)
PROBES = st.sampled_from(["rademacher", "popcount", "gaussian", "rank1"])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
COEFFICIENTS = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-1000, 1000),
    st.sampled_from([-(2**31), 2**31 - 1]),
)
# Random parts of random shapes: a hundred each where the law is about bits.
hundred = settings(max_examples=100)
few = settings(max_examples=30)


@st.composite
def parts(draw: st.DrawFn) -> tuple[Part, tuple[int, ...]]:
    """A part of a random tensor, and the shape of the weight that holds it."""
    shape = tuple(draw(st.lists(st.integers(1, 24), max_size=3)))
    kind = draw(st.sampled_from(["whole", "stretch", "rows and columns"]))
    if kind == "whole" or not shape:
        return Part(shape), shape
    if kind == "stretch":
        whole = math.prod(shape)
        offset = draw(st.integers(0, whole - 1))
        return Part(shape, offset), (draw(st.integers(1, whole - offset)),)
    rows = sorted(draw(st.sets(st.integers(0, shape[0] - 1), min_size=1)))
    width = math.prod(shape[1:])
    columns = sorted(draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=50)))
    if len(shape) == 1:
        return Part(shape, rows=rows), (len(rows),)
    return Part(shape, rows=rows, columns=columns), (len(rows), len(columns))


def weight_like(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values of many magnitudes, so that roundings matter."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    exponents = torch.randint(-12, 4, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * 2.0**exponents).to(dtype)


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


@hundred
@given(held=parts(), seed=SEEDS, tensor_id=TENSOR_IDS, probe=PROBES)
def test_noise_has_the_bits_of_the_reference(held, seed, tensor_id, probe):
    part, shape = held
    out = torch.empty(shape, device=DEVICE)
    gpu.noise_(out, seed, tensor_id, probe, part)
    unit = float32(reference.UNITS[probe])
    elements = part.elements(math.prod(shape))
    zeros = torch.zeros(shape)
    expected = truth.perturbed(zeros, seed, unit, tensor_id, probe, part.shape, elements)
    assert digest(out) == digest(expected)


@hundred
@given(parts(), DTYPES, SEEDS, st.floats(-10, 10, width=32), TENSOR_IDS, PROBES)
def test_perturb_has_the_bits_of_the_reference(held, dtype, seed, step, tensor_id, probe):
    part, shape = held
    weight = weight_like(shape, dtype, seed)
    elements = part.elements(weight.numel())
    expected = truth.perturbed(weight, seed, step, tensor_id, probe, part.shape, elements)
    moved = weight.to(DEVICE)
    gpu.perturb(moved, moved, seed, step, tensor_id, probe, part)
    assert digest(moved) == digest(expected)


@hundred
@given(
    parts(),
    DTYPES,
    st.lists(st.tuples(SEEDS, COEFFICIENTS), min_size=1, max_size=3),
    st.integers(-40, -30),
    TENSOR_IDS,
    PROBES,
)
def test_replay_has_the_bits_of_the_reference(held, dtype, pairs, exponent, tensor_id, probe):
    part, shape = held
    seeds = [seed for seed, _ in pairs]
    coefficients = [coefficient for _, coefficient in pairs]
    factor = math.ldexp(1.0, exponent) * reference.UNITS[probe]
    weight = weight_like(shape, dtype, seeds[0])
    elements = part.elements(weight.numel())
    expected = truth.replayed(
        weight, seeds, coefficients, factor, tensor_id, probe, part.shape, elements
    )
    moved = weight.to(DEVICE)
    as_tensor = torch.tensor(coefficients, dtype=torch.int32)
    gpu.replay_(moved, seeds, as_tensor, factor, tensor_id, probe, part)
    assert digest(moved) == digest(expected)


@few
@given(parts(), DTYPES, st.lists(SEEDS, min_size=1, max_size=4), TENSOR_IDS, PROBES)
def test_projections_agree(held, dtype, seeds, tensor_id, probe):
    part, shape = held
    delta = weight_like(shape, dtype, seeds[0])
    elements = part.elements(delta.numel())
    expected = truth.projected(delta, seeds, tensor_id, probe, part.shape, elements)
    measured = gpu.project(delta.to(DEVICE), seeds, tensor_id, probe, part).cpu()
    assert measured.dtype == torch.float64
    assert (measured - expected).abs().max() <= 1e-6 * delta.double().norm()


def test_the_public_functions_use_it_where_it_is_chosen():
    weight = weight_like((30, 20), torch.bfloat16, 3)
    part = Part((40, 20), offset=21)
    before = fk.backend()
    results = {}
    try:
        for backend, device in (("reference", torch.device("cpu")), ("triton", DEVICE)):
            fk.use_backend(backend)
            moved = weight.to(device, copy=True)
            results[backend] = [
                fk.noise(5, 7, (30, 20), "gaussian", part, device=device),
                fk.perturbed(moved, 5, 0.1, 7, "popcount", part=part),
                fk.replay_(moved, [5, 6], [7, -8], -9, 7, "rank1", part),
                fk.project(moved, [5, 6], 7, "rademacher", part),
            ]
    finally:
        fk.use_backend(before)
    *same, reference_sums = results["reference"]
    *mine, sums = results["triton"]
    assert [digest(tensor) for tensor in mine] == [digest(tensor) for tensor in same]
    torch.testing.assert_close(sums.cpu(), reference_sums, rtol=1e-6, atol=1e-6)
