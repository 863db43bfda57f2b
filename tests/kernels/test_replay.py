"""perturb, replay and project: the same bits on every backend, thread count, seed order and part."""

from __future__ import annotations

import hashlib
import random

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fedkernels as fk
from fedkernels.pruning.plan import LayerPlan, PruningPlan
from fedkernels.pruning.structure import LayerShape

PROBES = pytest.mark.parametrize("probe", fk.PROBES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = st.integers(0, 2**64 - 1)
# small, for the reference is slow; tiles of 2048 elements and their borders are examples of their own
SHAPE = st.one_of(
    st.tuples(st.integers(1, 700)),
    st.tuples(st.integers(1, 20), st.integers(1, 40)),
    st.tuples(st.integers(1, 3), st.integers(1, 300)),
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
)
LARGE_SHAPES = ((5000,), (3, 2500), (2, 4096), (40, 150))
no_fixture_state = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def weight_of(shape, dtype, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on(backend, function):
    """Return the result of function() on a backend."""
    before = fk.backend()
    fk.use_backend(backend)
    try:
        return function()
    finally:
        fk.use_backend(before)


def some_seeds(seed: int, count: int, largest: int) -> tuple[list[int], list[int]]:
    draw = random.Random(seed)
    seeds = [draw.getrandbits(64) for _ in range(count)]
    return seeds, [draw.randint(-largest, largest - 1) for _ in range(count)]


@PROBES
@settings(max_examples=100)
@given(
    shape=SHAPE,
    dtype=st.sampled_from(DTYPES),
    seed=SEED,
    tensor_id=st.integers(0, 2**64 - 2),
    count=st.sampled_from([1, 2, 3, 5, 18]),
    # beyond 2**26 the sums of 18 seeds leave 32 bits
    bits=st.sampled_from([10, 26, 31]),
)
def test_all_backends_agree(probe, shape, dtype, seed, tensor_id, count, bits):
    check_agreement(probe, shape, dtype, seed, tensor_id, count, bits)


@PROBES
@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_all_backends_agree_beyond_one_tile(probe, shape):
    check_agreement(probe, shape, torch.bfloat16, 12, 2**33, 5, 31)


def check_agreement(probe, shape, dtype, seed, tensor_id, count, bits):
    weight = weight_of(shape, dtype)
    seeds, coefficients = some_seeds(seed, count, 2**bits)

    def results():
        moved = fk.perturbed(weight, seed, 0.37, tensor_id, probe)
        rebuilt = fk.replay_(weight.clone(), seeds, coefficients, -bits, tensor_id, probe)
        return digest(moved), digest(rebuilt)

    expected = on("reference", results)
    for name in fk.backends()[1:]:
        assert on(name, results) == expected, name


@PROBES
@settings(max_examples=25)
@given(shape=SHAPE, dtype=st.sampled_from(DTYPES), seed=SEED, count=st.sampled_from([1, 3, 18]))
@example(shape=(3, 2500), dtype=torch.float32, seed=1, count=3)
def test_all_backends_measure_the_same_change(probe, shape, dtype, seed, count):
    delta = weight_of(shape, dtype)
    seeds, _ = some_seeds(seed, count, 1)
    expected = on("reference", lambda: fk.project(delta, seeds, 5, probe))
    for name in fk.backends()[1:]:
        found = on(name, lambda: fk.project(delta, seeds, 5, probe))
        assert (found - expected).norm() <= 1e-6 * delta.double().norm() * count**0.5, name


@PROBES
def test_threads_do_not_change_a_bit(backend, probe):
    weight = weight_of((61, 1000 if backend != "reference" else 100), torch.float32)
    seeds, coefficients = some_seeds(3, 9, 1000)
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            moved = fk.perturbed(weight, 1, 0.5, 2, probe)
            rebuilt = fk.replay_(weight.clone(), seeds, coefficients, -9, 2, probe)
            inner = fk.project(weight, seeds, 2, probe)
            compiled = backend != "reference"  # torch's own sums may depend on threads
            found.add((digest(moved), digest(rebuilt), digest(inner) if compiled else ""))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("probe", ["rademacher", "popcount", "rank1"])
@settings(no_fixture_state, max_examples=10)
@given(permutation=st.permutations(range(18)), bits=st.sampled_from([10, 31]))
def test_the_order_of_seeds_does_not_matter(backend, probe, permutation, bits):
    weight = weight_of((7, 41), torch.float32)
    seeds, coefficients = some_seeds(5, 18, 2**bits)
    moved = fk.replay_(weight.clone(), seeds, coefficients, -bits, 3, probe)
    other = fk.replay_(
        weight.clone(),
        [seeds[k] for k in permutation],
        [coefficients[k] for k in permutation],
        -bits,
        3,
        probe,
    )
    assert torch.equal(moved, other)


@st.composite
def parts(draw):
    """Draw a shape, and a selection of its rows or columns, or a stretch: (part, index function)."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 300)))
    if draw(st.booleans()):
        total = shape[0] * shape[1]
        offset = draw(st.integers(0, total - 1))
        count = draw(st.integers(1, total - offset))
        return fk.Part(shape, offset=offset), lambda t: t.flatten()[offset : offset + count]
    sets = [
        draw(st.none() | st.sets(st.integers(0, size - 1), min_size=1).map(sorted))
        for size in shape
    ]
    rows, columns = (slice(None) if s is None else s for s in sets)
    part = fk.Part(shape, rows=sets[0], columns=sets[1])
    return part, lambda t: t[rows][:, columns].contiguous()


@PROBES
@settings(max_examples=40)
@given(selection=parts(), dtype=st.sampled_from(DTYPES), seed=SEED)
def test_a_part_is_the_part_of_the_whole(probe, selection, dtype, seed):
    part, of = selection
    whole = weight_of(part.shape, dtype)
    held = of(whole).clone()
    seeds, coefficients = some_seeds(seed, 3, 1000)
    # the wholes are everywhere the same bits, so one backend makes them
    z = fk.noise(seed, 8, part.shape, probe)
    moved = fk.perturbed(whole, seed, 0.1, 8, probe)
    rebuilt = fk.replay_(whole.clone(), seeds, coefficients, -10, 8, probe)
    exact = torch.stack(
        [
            held.double().flatten() @ of(fk.noise(s, 8, part.shape, probe)).double().flatten()
            for s in seeds
        ]
    )
    limit = 2e-6 * held.double().norm() * held.numel() ** 0.5

    def check():
        assert torch.equal(fk.noise(seed, 8, held.shape, probe, part), of(z))
        assert torch.equal(fk.perturbed(held, seed, 0.1, 8, probe, part=part), of(moved))
        assert (fk.project(held, seeds, 8, probe, part) - exact).abs().max() <= limit
        again = fk.replay_(held.clone(), seeds, coefficients, -10, 8, probe, part)
        assert torch.equal(again, of(rebuilt))

    for backend in fk.backends():
        on(backend, check)


def test_a_pruned_layer_has_its_part_of_the_probe(backend):
    shape = LayerShape("layers.0", hidden=12, heads=4, kv_heads=2, head_dim=3, channels=20)
    kept = LayerPlan(shape, torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1, 7, 8, 19]))
    plan = PruningPlan((kept,))
    for tensor_id, name in enumerate(plan.parameters):
        indices = plan.indices(name)
        part = fk.Part(indices.shape, rows=indices.rows, columns=indices.columns)
        z = fk.noise(4, tensor_id, indices.shape, "rank1")
        for axis, index in enumerate((indices.rows, indices.columns)):
            z = z if index is None else z.index_select(axis, index)
        assert torch.equal(fk.noise(4, tensor_id, indices.kept_shape, "rank1", part), z)
        weight = torch.zeros(indices.kept_shape)
        fk.replay_(weight, [4], [3], -1, tensor_id, "rank1", part)
        assert torch.equal(weight, 1.5 * z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_scratch_perturbations_change_no_bit(dtype):
    layers = [weight_of(shape, dtype, i) for i, shape in enumerate([(40, 30), (100,), (7, 9)])]
    before = [digest(layer) for layer in layers]
    scratch = torch.empty(1200, dtype=dtype)
    for seed in range(1000):
        for tensor_id, layer in enumerate(layers):
            out = scratch[: layer.numel()].view(layer.shape)
            fk.perturbed(layer, seed, 1e-2 * (-1) ** seed, tensor_id, out=out)
    assert [digest(layer) for layer in layers] == before
    expected = fk.perturb_(layers[-1].clone(), 999, -1e-2, 2)
    assert torch.equal(scratch[:63].view(7, 9), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@PROBES
def test_a_rebuilt_weight_has_the_error_of_one_rounding(backend, dtype, probe):
    weight = weight_of((20, 40), dtype)
    seeds, coefficients = some_seeds(1, 32, 2**20)
    exact = weight.double() + sum(
        c * 2.0**-26 * fk.noise(s, 4, weight.shape, probe).double()
        for s, c in zip(seeds, coefficients, strict=True)
    )
    rebuilt = fk.replay_(weight.clone(), seeds, coefficients, -26, 4, probe)
    ideal = (exact.to(dtype).double() - exact).norm()
    assert (rebuilt.double() - exact).norm() <= 1.05 * ideal


W = torch.zeros(2, 3)
NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fk.perturb_(W.double(), 1, 0.1, 0), "weight"),
        (lambda: fk.perturb_(W.T, 1, 0.1, 0), "weight"),
        (lambda: fk.perturb_(W[:0], 1, 0.1, 0), "weight"),
        (lambda: fk.perturb_(W.to("meta"), 1, 0.1, 0), "weight"),
        (lambda: fk.perturb_(W, -1, 0.1, 0), "seed"),
        (lambda: fk.perturb_(W, 1, NAN, 0), "scale"),
        (lambda: fk.perturb_(W, 1, 1e300, 0), "scale"),
        (lambda: fk.perturb_(W, 1, 0.1, 2**64 - 1), "tensor_id"),
        (lambda: fk.perturb_(W, 1, 0.1, 0, "cauchy"), "probe"),
        (lambda: fk.perturb_(W, 1, 0.1, 0, part=fk.Part((2, 2))), "weight"),
        (lambda: fk.perturb_(W, 1, 0.1, 0, part=fk.Part((4, 3), rows=[0])), "weight"),
        (lambda: fk.perturbed(W, 1, 0.1, 0, out=W.half()), "out"),
        (lambda: fk.perturbed(W, 1, 0.1, 0, out=W.view(6)), "out"),
        (lambda: fk.perturbed(W.view(6)[:4], 1, 0.1, 0, out=W.view(6)[1:5]), "out"),
        (lambda: fk.replay_(W, [], [], 0, 0), "seeds"),
        (lambda: fk.replay_(W, [1], [1, 2], 0, 0), "coefficients"),
        (lambda: fk.replay_(W, [1], [2**31], 0, 0), "coefficients"),
        (lambda: fk.replay_(W, [1], [0.5], 0, 0), "coefficients"),
        (lambda: fk.replay_(W, torch.tensor([0.5]), [1], 0, 0), "seeds"),
        (lambda: fk.replay_(W, [2**64], [1], 0, 0), "seeds"),
        (lambda: fk.replay_(W, [1], [1], 1000, 0), "exponent"),
        (lambda: fk.project(W.int(), [1], 0), "delta"),
        (lambda: fk.project(W, [-1], 0), "seeds"),
        (lambda: fk.Part((2, 3), offset=7), "offset"),
        (lambda: fk.Part((2, -3)), "shape"),
        (lambda: fk.Part((2**31, 2**31)), "shape"),
        (lambda: fk.Part((2, 3), rows=[2]), "rows"),
        (lambda: fk.Part((2, 3), rows=[1, 0]), "rows"),
        (lambda: fk.Part((2, 3), columns=[-1]), "columns"),
        (lambda: fk.Part((2, 3), columns=[0.5]), "columns"),
        (lambda: fk.Part((2, 3), offset=1, rows=[0]), "offset"),
        (lambda: fk.noise(1, 2, (4,), part=fk.Part((3,))), "shape"),
    ],
)
def test_bad_input_is_refused_by_name(call, named):
    with pytest.raises(ValueError, match=named):
        call()
    assert not W.any()
