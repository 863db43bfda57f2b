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
    decode,
    encode,
)
from aggregators.codec import pack, unpack

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
