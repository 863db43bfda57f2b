"""Seed scalars and projections: what they refuse, their bytes, and the estimator that they are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedkernels as fk
from aggregators import (
    Layout,
    ProjectedGradient,
    SeedScalars,
    UpdateRejected,
    Verdict,
    allocation,
    along_probes,
    decode,
    encode,
)
from aggregators.codec import pack, unpack
from aggregators.projected import shrinkage

LAYOUT = Layout({"first": (6, 5), "norm": (5,)})


def scalars(**changes):
    given_ = {"master_seed": 3, "pool_size": 32, "indices": [1, 5, 9], "scalars": [0.5, -1.0, 2.0]}
    return SeedScalars(LAYOUT, **(given_ | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"master_seed": -1}, "master_seed"),
        ({"master_seed": 2**63}, "master_seed"),
        ({"pool_size": 0}, "pool_size"),
        ({"probe": "uniform"}, "uniform"),
        ({"indices": [1, 5, 32]}, "indices"),
        ({"indices": [-1, 5, 9]}, "indices"),
        ({"indices": [1, 9, 5]}, "ascend"),
        ({"indices": [1, 5, 5]}, "ascend"),
        ({"indices": [1, 5]}, "one length"),
        ({"scalars": [0.5, math.nan, 2.0]}, "finite"),
        ({"names": ["nowhere"]}, "nowhere"),
        ({"names": []}, "names"),
    ],
)
def test_seed_scalars_that_mean_nothing_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        scalars(**changes)


@pytest.mark.parametrize(
    ("coordinates", "words"),
    [
        ({"nowhere": torch.ones(2)}, "nowhere"),
        ({"first": torch.ones(0)}, "first"),
        ({"first": torch.ones(2, 2)}, "first"),
        ({"first": torch.tensor([1.0, math.inf])}, "finite"),
    ],
)
def test_projections_that_mean_nothing_are_refused(coordinates, words):
    with pytest.raises(ValueError, match=words):
        ProjectedGradient(LAYOUT, 3, coordinates)


def test_updates_on_other_probes_do_not_add():
    with pytest.raises(ValueError, match="pool"):
        scalars() + scalars(master_seed=4)
    with pytest.raises(ValueError, match="pool"):
        scalars() + scalars(names=["norm"])
    one = ProjectedGradient(LAYOUT, 3, {"first": torch.ones(2)})
    with pytest.raises(ValueError, match="probes"):
        one + ProjectedGradient(LAYOUT, 4, {"first": torch.ones(2)})
    with pytest.raises(ValueError, match="first"):
        one + ProjectedGradient(LAYOUT, 3, {"first": torch.ones(3)})


def test_the_expected_norm_is_the_mean_over_seeds():
    for make in (
        lambda seed: scalars(master_seed=seed),
        lambda seed: scalars(master_seed=seed, names=["norm"]),
        lambda seed: ProjectedGradient(LAYOUT, seed, {"first": torch.tensor([1.0, -2.0, 0.5])}),
    ):
        squares = [make(seed).squared_norm() for seed in range(200)]
        expected = make(0).expected_squared_norm()
        assert sum(squares) / len(squares) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_small_numbers_survive_a_short_type(dtype):
    """Projections of a large model are of the order of 1e-9, where float16 knows only 0."""
    values = torch.linspace(-1e-9, 1e-9, 11, dtype=torch.float64)
    update = ProjectedGradient(LAYOUT, 3, {"first": values, "norm": torch.tensor([1e-20])})
    again = decode(encode(update, dtype), LAYOUT)
    torch.testing.assert_close(again.coordinates["first"], values, rtol=0, atol=1e-9 / 126)
    assert float(again.coordinates["norm"][0]) == pytest.approx(1e-20, rel=1e-6)


def test_two_hundred_steps_of_a_pool_of_4096_fit_into_a_short_message():
    generator = torch.Generator().manual_seed(1)
    indices = torch.randperm(4096, generator=generator)[:200].sort().values
    values = torch.randn(200, generator=generator, dtype=torch.float64)
    update = SeedScalars(LAYOUT, 3, 4096, indices, values)
    _, tensors = unpack(encode(update, "float16"))
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 560
    assert len(encode(update, "int8")) <= 764
    assert len(encode(update, "int8")) < len(encode(update, "float16")) < len(encode(update))


def test_the_projection_of_a_change_is_unbiased():
    """E[1/K sum <D, z_k> z_k] = D for probes of unit variance; Ferret's code gives D / 3."""
    generator = torch.Generator().manual_seed(2)
    change = {"first": torch.randn(6, 5, generator=generator)}
    total = sum(
        ProjectedGradient.of(LAYOUT, seed, change, {"first": 40}).dense()["first"]
        for seed in range(60)
    )
    gain = float((total / 60 * change["first"]).sum() / change["first"].square().sum())
    assert gain == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="first"):
        ProjectedGradient.of(LAYOUT, 1, {"first": torch.ones(5, 6)}, {"first": 4})


def slow_projection(tensor, seeds, tensor_id, probe):
    """The definition, one probe at a time."""
    return torch.tensor(
        [
            float((tensor.double() * fk.noise(s, tensor_id, tensor.shape, probe)).sum())
            for s in seeds
        ],
        dtype=torch.float64,
    )


def slow_sum(shape, seeds, coefficients, tensor_id, probe):
    total = torch.zeros(shape, dtype=torch.float64)
    for seed, value in zip(seeds, coefficients.tolist(), strict=True):
        total += value * fk.noise(seed, tensor_id, shape, probe).double()
    return total


SHAPES = st.one_of(
    st.just(()), st.tuples(st.integers(1, 90)), st.tuples(st.integers(1, 40), st.integers(1, 40))
)


@given(
    shape=SHAPES,
    count=st.integers(1, 30),
    seed=st.integers(0, 2**62),
    probe=st.sampled_from(fk.PROBES),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    exponent=st.integers(-140, 140),
)
def test_all_probes_at_once_are_the_probes_one_at_a_time(
    shape, count, seed, probe, dtype, exponent
):
    generator = torch.Generator().manual_seed(seed % 1000)
    delta = torch.randn(shape, generator=generator, dtype=torch.float64)
    delta = delta * 10.0**exponent if dtype == torch.float64 else delta.to(dtype)
    seeds = [fk.derive_seed(seed, k) for k in range(count)]
    found, expected = (
        make(delta, seeds, 5, probe) for make in (along_probes.probe_products, slow_projection)
    )
    size = float(delta.double().norm()) * math.sqrt(delta.numel() * count)
    assert float((found - expected).abs().max()) <= 1e-6 * size
    coefficients = expected / count
    rebuilt = along_probes.probe_sum(shape, seeds, coefficients, 5, probe)
    singly = slow_sum(shape, seeds, coefficients, 5, probe)
    # popcount's unit, 1 / sqrt(8), is a float32 in a probe alone and a float64 in sums of them.
    tolerance = 1e-7 if probe == "popcount" else 1e-13
    bound = tolerance * float(coefficients.abs().sum())
    assert float((rebuilt - singly).abs().max()) <= bound * 7  # no element of a probe is larger


@pytest.mark.parametrize("value", [1.7e308, 5e-324, -1.7e308])
def test_sums_at_the_ends_of_float64_are_sums_or_infinite(value):
    """A hostile coordinate reaches the gate's norm check, which must not raise."""
    update = ProjectedGradient(
        LAYOUT, 3, {"first": torch.tensor([value, 1.0], dtype=torch.float64)}
    )
    assert not math.isnan(update.dense_tensor("first").abs().max())
    assert update.squared_norm() >= 0


def test_a_change_that_is_not_finite_is_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            ProjectedGradient.of(LAYOUT, 1, {"norm": torch.full((5,), bad)}, {"norm": 2})


@pytest.mark.parametrize("probe", fk.PROBES)
def test_the_shorter_scale_is_the_nearest(probe):
    """Its mean squared error is 1 - c, and that of any other length is larger."""
    layout = Layout({"w": (12, 10)})
    change = {"w": torch.randn(12, 10, generator=torch.Generator().manual_seed(1))}
    size = float(change["w"].double().square().sum())
    count, draws = 20, 400
    scale = shrinkage(count, 120, probe)
    errors = {factor: 0.0 for factor in (0.6, 1.0, 1.5, 1 / scale)}
    for seed in range(draws):
        shrunk = ProjectedGradient.of(layout, seed, change, {"w": count}, probe).shrunk()
        found = shrunk.dense_tensor("w")
        for factor in errors:
            errors[factor] += float((factor * found - change["w"]).square().sum()) / size / draws
    assert errors[1.0] == pytest.approx(1 - scale, abs=0.01)
    assert errors[1.0] < min(errors[factor] for factor in (0.6, 1.5, 1 / scale))
    assert errors[1 / scale] == pytest.approx(
        1 / scale - 1, rel=0.1
    )  # unbiased: (d + kappa - 2) / K


NORMS = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.one_of(st.just(0.0), st.floats(1e-300, 1e300)),
    min_size=1,
)


@given(norms=NORMS, spare=st.integers(0, 5000), power=st.integers(-3, 3))
def test_an_allocation_is_in_proportion_and_whole(norms, spare, power):
    total = len(norms) + spare
    counts = allocation(norms, total)
    assert counts.keys() == norms.keys()
    assert sum(counts.values()) == total
    assert min(counts.values()) >= 1
    largest = max(norms.values())
    whole = math.fsum(norm / largest for norm in norms.values()) if largest else 0.0
    for name, norm in norms.items():
        part = norm / largest / whole if whole else 1 / len(norms)
        assert abs(counts[name] - 1 - spare * part) <= 1 + 1e-9 * spare
    assert allocation(dict(reversed(norms.items())), total) == counts
    scaled = {name: norm * 2.0**power for name, norm in norms.items()}
    if all(0 < norm < 1e299 for norm in scaled.values()):
        assert allocation(scaled, total) == counts


def test_allocations_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="too few"):
        allocation({"a": 1.0, "b": 1.0}, 1)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="norms"):
            allocation({"a": bad}, 4)


def hostile(update, change):
    header, tensors = unpack(encode(update, "float16"))
    change(header, tensors)
    with pytest.raises(UpdateRejected) as refusal:
        decode(pack(header, tensors), LAYOUT)
    return refusal.value.verdict


def part_of_the_tensors():
    return scalars(names=["norm"])


def projection():
    return ProjectedGradient(LAYOUT, 3, {"first": torch.ones(3), "norm": torch.ones(2)})


@pytest.mark.parametrize(
    ("make", "change", "verdict"),
    [
        (scalars, lambda h, t: h.update(pool=4), Verdict.MALFORMED),
        (scalars, lambda h, t: h.update(pool=True), Verdict.MALFORMED),
        (scalars, lambda h, t: h.update(pool=2), Verdict.SHAPE),
        (scalars, lambda h, t: h.update(seed="3"), Verdict.MALFORMED),
        (scalars, lambda h, t: h.update(probe="other"), Verdict.MALFORMED),
        (scalars, lambda h, t: h.update(probe=["rademacher"]), Verdict.MALFORMED),
        (scalars, lambda h, t: t.pop("indices"), Verdict.MALFORMED),
        (scalars, lambda h, t: t.pop("numbers"), Verdict.MALFORMED),
        (scalars, lambda h, t: h.pop("largest"), Verdict.DTYPE),
        (projection, lambda h, t: t.pop("largest"), Verdict.DTYPE),
        (scalars, lambda h, t: t.update(extra=torch.ones(1)), Verdict.UNKNOWN_TENSOR),
        (scalars, lambda h, t: t.update(indices=t["indices"][:1]), Verdict.MALFORMED),
        (scalars, lambda h, t: t["numbers"].fill_(math.nan), Verdict.NOT_FINITE),
        (projection, lambda h, t: t["largest"].fill_(math.inf), Verdict.NOT_FINITE),
        (scalars, lambda h, t: h.update(largest=1e39), Verdict.NOT_FINITE),
        (scalars, lambda h, t: h.update(largest=10**400), Verdict.NOT_FINITE),
        (scalars, lambda h, t: h.update(largest=-1.0), Verdict.NOT_FINITE),
        (scalars, lambda h, t: h.update(largest="1"), Verdict.NOT_FINITE),
        (part_of_the_tensors, lambda h, t: t["tensors"].fill_(0), Verdict.MALFORMED),
        (part_of_the_tensors, lambda h, t: t["tensors"][:4].fill_(255), Verdict.MALFORMED),
        (part_of_the_tensors, lambda h, t: t.update(tensors=torch.ones(2)), Verdict.MALFORMED),
        (
            part_of_the_tensors,
            lambda h, t: t.update(tensors=torch.tensor([2, 0, 0, 0, 0, 63], dtype=torch.uint8)),
            Verdict.MALFORMED,
        ),
        (scalars, lambda h, t: t.update(numbers=t["numbers"].double()), Verdict.MALFORMED),
        (scalars, lambda h, t: t.update(numbers=torch.ones(3, dtype=torch.int32)), Verdict.DTYPE),
        (projection, lambda h, t: t.pop("ids"), Verdict.MALFORMED),
        (projection, lambda h, t: t.update(ids=t["ids"].flip(0)), Verdict.UNKNOWN_TENSOR),
        (projection, lambda h, t: t.update(ids=t["ids"] + 1), Verdict.UNKNOWN_TENSOR),
        (projection, lambda h, t: t.update(ids=t["ids"].long()), Verdict.DTYPE),
        (projection, lambda h, t: t.update(counts=t["counts"] + 1), Verdict.SHAPE),
        (projection, lambda h, t: t.update(counts=t["counts"] * 0), Verdict.SHAPE),
        (projection, lambda h, t: t.update(counts=t["counts"][:1]), Verdict.SHAPE),
        (projection, lambda h, t: t["numbers"].fill_(math.inf), Verdict.NOT_FINITE),
        (projection, lambda h, t: h.update(seed=2**63), Verdict.MALFORMED),
    ],
)
def test_hostile_bytes_have_a_verdict(make, change, verdict):
    assert hostile(make(), change) is verdict


@given(data=st.binary(max_size=60), coded=st.booleans())
def test_any_bytes_in_the_place_of_the_indices_are_refused_or_read(data, coded):
    header, tensors = unpack(encode(scalars()))
    tensors["indices"] = torch.tensor(list(data), dtype=torch.uint8)
    try:
        found = decode(pack(header, tensors), LAYOUT)
    except UpdateRejected:
        return
    assert isinstance(found, SeedScalars)
    assert len(found.indices) == 3


def test_probes_are_those_of_the_kernels():
    update = SeedScalars(LAYOUT, 3, 32, [7], [2.0])
    expected = 2.0 * fk.noise(fk.derive_seed(3, 7), 0, (6, 5)).double()
    assert torch.equal(update.dense()["first"], expected)


@pytest.mark.parametrize("names", [["first"], ["norm"]])
def test_a_scope_keeps_the_probes_and_leaves_out_the_other_tensors(names):
    whole, part = scalars(), scalars(names=names)
    expected = {name: whole.dense()[name] for name in names}
    for update in (part, part * 2.0 - part, decode(encode(part), LAYOUT)):
        assert update.names == tuple(names)
        assert update.dense().keys() == expected.keys()
        for name in names:
            torch.testing.assert_close(update.dense()[name], expected[name], rtol=1e-14, atol=1e-14)
    squares = sum(float(change.square().sum()) for change in expected.values())
    for other in (whole, part):
        assert part.inner(other) == pytest.approx(squares)
        assert other.inner(part) == pytest.approx(squares)
    assert part != whole
    assert decode(encode(part), LAYOUT) == part
    assert scalars(names=["norm", "first"]) == whole
