"""From a change to a message and a residual: nothing is lost, only late."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aggregators import Basis, Layout, Sketch, aggregate, decode, encode
from aggregators.methods import ProjectedMethod, SketchMethod
from fedclient.local import projection

LAYOUT = Layout({"first": (24, 16), "norm": (6,), "second": (12, 30)})
NAMES = [spec.name for spec in LAYOUT]
COUNTS = {"first": 60, "norm": 4, "second": 40}
DTYPES = st.sampled_from([None, "float32", "bfloat16", "float16", "int8"])
SEEDS = st.integers(0, 2**32)


def projected(**changes):
    common = {"target_modules": (), "master_seed": 4, "optimiser": "sgd", "error_feedback": True}
    return ProjectedMethod(**common | {"probe": "rademacher", "coordinates": COUNTS} | changes)


def sketched(**changes):
    common = {"target_modules": (), "master_seed": 4, "optimiser": "sgd", "error_feedback": True}
    return SketchMethod(**common | {"rank": 2, "oversampling": 3} | changes)


def change(seed, names=NAMES):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(LAYOUT.shape(n), generator=generator) for n in names}


def norm(tensors):
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-5)


@given(seed=SEEDS, dtype=DTYPES, probe=st.sampled_from(["rademacher", "rank1", "gaussian"]))
def test_what_a_projection_leaves_is_the_rest(seed, dtype, probe):
    method, before = projected(probe=probe), change(seed + 1)
    delta = change(seed)
    update, left = projection.project(LAYOUT, method, delta, before, dtype)
    arrived = decode(encode(update, dtype), LAYOUT).shrunk().dense()
    same(left, {n: delta[n].double() + before[n] - arrived[n] for n in NAMES})


@given(seed=SEEDS, dtype=DTYPES)
def test_what_a_sketch_leaves_is_the_rest(seed, dtype):
    method, before, delta = sketched(), change(seed + 1), change(seed)
    basis = Basis.random(LAYOUT, NAMES, 5, 2, 3)
    update, left = projection.sketch(LAYOUT, method, basis, delta, before, dtype)
    arrived = decode(encode(update, dtype), LAYOUT)
    read = arrived.reconstruct(basis).dense() | arrived.whole_change().dense()
    same(left, {n: delta[n].double() + before[n] - read[n] for n in NAMES})


@given(seeds=st.lists(SEEDS, min_size=2, max_size=4, unique=True), dtype=DTYPES)
def test_what_a_cohort_leaves_is_what_the_server_does_not_read(seeds, dtype):
    """In a basis that has been refined; every node knows its own sketch alone."""
    basis = Basis.random(LAYOUT, NAMES, 5, 2, 3)
    basis = basis.refined(Sketch.of(LAYOUT, basis, change(0)))
    results = [projection.sketch(LAYOUT, sketched(), basis, change(s), None, dtype) for s in seeds]
    arrived = [decode(encode(update, dtype), LAYOUT) for update, _ in results]
    total = aggregate([(update, 1.0) for update in arrived], LAYOUT).updates["sketch"]
    read = total.reconstruct(basis).dense() | total.whole_change().dense()
    count = len(seeds)
    for name in NAMES:
        left = sum(residual[name].double() for _, residual in results) / count
        whole = sum(change(seed)[name].double() for seed in seeds) / count
        torch.testing.assert_close(whole - read[name], left, rtol=1e-4, atol=1e-4)


def test_arguments_are_left_as_they_are():
    delta, before = change(1), change(2)
    copies = {n: t.clone() for n, t in delta.items()}, {n: t.clone() for n, t in before.items()}
    basis = Basis.random(LAYOUT, NAMES, 5, 2, 3)
    projection.sketch(LAYOUT, sketched(), basis, delta, before)
    projection.project(LAYOUT, projected(), delta, before)
    for now, then in zip((delta, before), copies, strict=True):
        assert all(torch.equal(tensor, then[name]) for name, tensor in now.items())


@given(seed=SEEDS)
def test_tensors_that_are_not_asked_for_wait(seed):
    method = projected(coordinates={"first": 9})
    update, left = projection.project(LAYOUT, method, change(seed, ["first", "norm"]), None)
    assert set(update.coordinates) == {"first"}
    assert torch.equal(left["norm"], change(seed, ["first", "norm"])["norm"])
    basis = Basis.random(LAYOUT, ["second"], 5, 2, 3)
    sketch, left = projection.sketch(LAYOUT, sketched(), basis, change(seed, ["second"]), left)
    assert set(sketch.views) == {"second"}
    assert {"first", "norm", "second"} == left.keys()


@pytest.mark.parametrize("kind", ["projected", "sketched"])
def test_without_feedback_nothing_is_kept_and_nothing_added(kind):
    delta, before = change(1), change(2)
    basis = Basis.random(LAYOUT, NAMES, 5, 2, 3)
    if kind == "projected":
        method = projected(error_feedback=False)
        update, left = projection.project(LAYOUT, method, delta, before)
        alone, _ = projection.project(LAYOUT, projected(), delta)
    else:
        update, left = projection.sketch(
            LAYOUT, sketched(error_feedback=False), basis, delta, before
        )
        alone, _ = projection.sketch(LAYOUT, sketched(), basis, delta)
    assert left == {}
    assert update == alone


def test_a_residual_does_not_grow_without_bound():
    """A change that stays the same: with the shorter scale the sum of messages catches up with it."""
    delta, left, sent = change(3), {}, dict.fromkeys(NAMES, 0.0)
    norms = []
    for number in range(60):
        method = projected(master_seed=number)
        update, left = projection.project(
            LAYOUT, method, delta if number == 0 else {n: 0 * t for n, t in delta.items()}, left
        )
        for name, tensor in update.shrunk().dense().items():
            sent[name] = sent[name] + tensor
        norms.append(norm(left))
    assert norms[-1] < 0.3 * norms[0] < 0.3 * norm(delta)
    for name in NAMES:
        torch.testing.assert_close(
            sent[name] + left[name], delta[name].double(), rtol=1e-4, atol=1e-4
        )
