"""Sketches: what they refuse, their bytes, what they are read as, and the basis that follows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import Basis, Layout, Sketch, UpdateRejected, Verdict, aggregate, decode, encode
from aggregators.basis import independent
from aggregators.codec import WIRE_DTYPES, pack, unpack

LAYOUT = Layout({"first": (40, 30), "norm": (5,), "second": (24, 48), "small": (4, 4)})
NAMES = [spec.name for spec in LAYOUT]
SEEDS = st.integers(0, 2**32)


def basis(seed=1, rank=3, oversampling=3):
    return Basis.random(LAYOUT, NAMES, seed, rank, oversampling)


def change(seed=0, rank=None, magnitude=1.0):
    """A random change of all tensors; matrices of ``rank``."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for spec in LAYOUT:
        found[spec.name] = magnitude * torch.randn(spec.shape, generator=generator)
        if rank is not None and len(spec.shape) == 2:
            m, n = spec.shape
            left = torch.randn(m, rank, generator=generator)
            found[spec.name] = magnitude * left @ torch.randn(rank, n, generator=generator)
    return found


def spectral(rows, columns, values, seed):
    """A matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    count = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, count, generator=generator).double()).Q
    v = torch.linalg.qr(torch.randn(columns, count, generator=generator).double()).Q
    return (u * values(torch.arange(count, dtype=torch.float64))) @ v.T


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


# Singular values by their place; None: a matrix of independent normal numbers.
SPECTRA = {
    "random": None,
    "slow": lambda i: (i + 1) ** -0.5,
    "harmonic": lambda i: 1 / (i + 1),
    "steep": lambda i: (i + 1) ** -2.0,
    "geometric": lambda i: 0.8**i,
    "halving": lambda i: 0.5**i,
    "low rank and noise": lambda i: torch.where(i < 4, 1.0, 0.02),
}


@settings(max_examples=40)
@given(
    spectrum=st.sampled_from(sorted(SPECTRA)),
    rank=st.sampled_from([4, 8]),
    rows=st.integers(60, 160),
    columns=st.integers(60, 160),
    seed=SEEDS,
)
def test_a_change_that_stays_is_read_nearly_as_well_as_a_rank_allows(
    spectrum, rank, rows, columns, seed
):
    """Within 1.5 of the best of that rank: in the mean at once, and surely once the basis has followed.

    A floor of noise under a low rank is no decaying spectrum, and one look finds it less well.
    """
    layout = Layout({"w": (rows, columns)})
    values = SPECTRA[spectrum]
    if values is None:
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    else:
        matrix = spectral(rows, columns, values, seed)
    optimum = float(torch.linalg.svdvals(matrix)[rank:].norm())
    errors = []
    for draw in range(4):
        used = Basis.random(layout, ["w"], seed + draw, rank, rank)
        errors.append([])
        for _ in range(4 if draw == 0 else 1):
            sketch = Sketch.of(layout, used, {"w": matrix})
            found = sketch.reconstruct(used).dense()["w"]
            errors[-1].append(float((found - matrix).norm()) / optimum)
            used = used.refined(sketch)
    assert max(errors[0][1:]) <= 1.5
    if spectrum != "low rank and noise":
        assert sum(found[0] for found in errors) / len(errors) <= 1.5


@settings(max_examples=30)
@given(rows=st.integers(10, 40), columns=st.integers(10, 40), seed=SEEDS)
def test_without_oversampling_readings_are_not_much_worse_than_nothing(rows, columns, seed):
    """In the mean of some draws; a plain generalised Nystrom form has no bound there."""
    layout = Layout({"w": (rows, columns)})
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    errors = []
    for draw in range(10):
        used = Basis.random(layout, ["w"], seed + draw, 2, 0, wide=False)
        found = Sketch.of(layout, used, {"w": matrix}).reconstruct(used).dense()["w"]
        errors.append(float((found - matrix).norm() / matrix.norm()))
    assert sum(errors) / len(errors) <= 1.5


@given(rank=st.integers(1, 3), seed=SEEDS)
def test_a_change_of_low_rank_comes_back_whole_from_any_basis(rank, seed):
    delta = change(seed, rank)
    sketch = Sketch.of(LAYOUT, basis(seed), delta)
    found = sketch.reconstruct(basis(seed)).dense() | sketch.whole_change().dense()
    for name, tensor in delta.items():
        assert relative_error(found[name], tensor.double()) <= 1e-3


def followed(seed):
    """A basis that has seen one change, and a sketch in it of another."""
    used = basis(seed)
    return used.refined(Sketch.of(LAYOUT, used, change(seed)))


@given(seed=SEEDS, refine=st.booleans())
def test_what_is_read_has_the_views_that_were_sent(seed, refine):
    used = followed(seed) if refine else basis(seed)
    sketch = Sketch.of(LAYOUT, used, change(seed + 1))
    read = {n: t for n, t in sketch.reconstruct(used).dense().items() if n in used.sides}
    again = Sketch.of(LAYOUT, used, read)
    for name, view in sketch.views.items():
        torch.testing.assert_close(again.views[name].P, view.P, rtol=0, atol=1e-4)
        torch.testing.assert_close(again.views[name].R, view.R, rtol=0, atol=1e-4)


@given(seed=SEEDS, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_in_a_basis_that_has_followed_reading_is_linear_and_shortens(seed, a, b):
    used = followed(seed)
    one, two = (Sketch.of(LAYOUT, used, change(seed + n)) for n in (1, 2))
    found = (one * a + two * b).reconstruct(used).dense()
    parts = one.reconstruct(used).dense(), two.reconstruct(used).dense()
    for name, exact in change(seed + 1).items():
        if name not in used.sides:
            continue
        expected = a * parts[0][name] + b * parts[1][name]
        torch.testing.assert_close(
            found.get(name, torch.zeros((), dtype=torch.float64)).expand_as(expected),
            expected,
            rtol=1e-4,
            atol=1e-4,
        )
        # A projection: what was read and what was not are orthogonal.
        left = float((exact - parts[0][name]).square().sum())
        read = float(parts[0][name].square().sum())
        assert left + read == pytest.approx(float(exact.double().square().sum()), rel=1e-4)


@given(seeds=st.lists(SEEDS, min_size=1, max_size=4), weight=st.floats(0.1, 10))
def test_the_sketch_of_a_sum_is_the_sum_of_sketches(seeds, weight):
    used = basis()
    parts = [Sketch.of(LAYOUT, used, change(seed)) for seed in seeds]
    found = aggregate([(part, weight) for part in parts], LAYOUT).updates["sketch"]
    mean = {n: sum(change(s)[n].double() for s in seeds) / len(seeds) for n in NAMES}
    expected = Sketch.of(LAYOUT, used, mean).dense()
    assert found.dense().keys() == expected.keys()
    for key, tensor in found.dense().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)


@given(seed=SEEDS)
def test_the_norm_of_coordinates_is_bounded_by_that_of_the_change(seed):
    delta = change(seed)
    squares = sum(float(tensor.double().square().sum()) for tensor in delta.values())
    assert Sketch.of(LAYOUT, basis(), delta).squared_norm() <= 2 * squares * (1 + 1e-5)


def test_what_views_would_not_make_smaller_is_whole():
    used = basis()
    assert set(used.sides) == {"first", "second"}
    assert used.whole == ("norm", "small")
    delta = change()
    sketch = Sketch.of(LAYOUT, used, delta)
    assert sketch.size == used.size < LAYOUT.elements
    assert torch.equal(sketch.whole["small"], delta["small"].double())


@given(seed=st.integers(0, 2**62), rank=st.integers(1, 5), oversampling=st.integers(0, 4))
def test_sides_are_orthonormal_and_nested(seed, rank, oversampling):
    found, larger = basis(seed, rank, oversampling), basis(seed, rank + 1, oversampling)
    for name, sides in found.sides.items():
        for side in (sides.Q, sides.Y):
            gram = side.double().T @ side.double()
            torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-6)
        if name in larger.sides:
            shared = min(sides.Q.shape[1], larger.sides[name].Q.shape[1])
            assert torch.equal(larger.sides[name].Q[:, :shared], sides.Q[:, :shared])


@given(seed=SEEDS, missing=st.sampled_from(["first", "second", None]))
def test_a_basis_is_refined_to_a_basis(seed, missing):
    """Also where a node trained one matrix alone, or the change was of a smaller rank than the basis."""
    delta = change(seed, rank=1)
    delta.pop(missing, None)
    used = basis(seed)
    for number in range(3):
        following = used.refined(Sketch.of(LAYOUT, used, delta))
        assert following.refinement == number + 1
        for name, sides in following.sides.items():
            rows, columns = LAYOUT.shape(name)
            assert (sides.Q.shape, sides.Y.shape) == ((columns, 3), (rows, 6))
        if missing:
            torch.testing.assert_close(following.sides[missing].Q, used.sides[missing].Q[:, :3])
        used = following


def test_no_change_leaves_the_right_side_and_reads_as_no_change():
    used = basis()
    nothing = Sketch.of(LAYOUT, used, {n: torch.zeros(LAYOUT.shape(n)) for n in NAMES})
    assert nothing.reconstruct(used).factors == {}
    following = used.refined(nothing)
    for name, sides in used.sides.items():
        torch.testing.assert_close(following.sides[name].Q, sides.Q[:, :3])


@given(seed=st.integers(0, 2**62))
def test_a_basis_survives_its_bytes(seed):
    used = basis(seed).refined(Sketch.of(LAYOUT, basis(seed), change(seed % 97)))
    again = Basis.from_bytes(used.to_bytes(), LAYOUT)
    assert again.to_bytes() == used.to_bytes()
    assert again.digest == used.digest
    assert (again.master_seed, again.refinement, again.whole) == (seed, 1, used.whole)
    sketch = Sketch.of(LAYOUT, used, change(3))
    assert again.refined(sketch).digest == used.refined(sketch).digest


@pytest.mark.parametrize(
    "spoil",
    [
        lambda h, t: h.pop("seed"),
        lambda h, t: h.update(seed=-1),
        lambda h, t: h.update(schema=9),
        lambda h, t: h.update(basis="0" * 64),
        lambda h, t: h.update(whole=[99]),
        lambda h, t: h.update(whole=[0]),
        lambda h, t: t.pop("first#Q"),
        lambda h, t: t.update(other=torch.ones(1)),
        lambda h, t: t["first#Q"].mul_(2),
        lambda h, t: t["first#Q"].fill_(math.nan),
        lambda h, t: t.update({"first#Y": t["second#Y"]}),
        lambda h, t: t.update({"first#Y": t["first#Y"].double()}),
    ],
)
def test_bytes_of_no_basis_are_refused(spoil):
    header, tensors = unpack(basis().to_bytes())
    spoil(header, tensors)
    with pytest.raises(ValueError, match=r"basis|layer|layout"):
        Basis.from_bytes(pack(header, tensors), LAYOUT)


def test_independent_leaves_out_what_depends_on_earlier_columns():
    one = torch.randn(9, 2, generator=torch.Generator().manual_seed(1))
    found = independent([one, one * 3, torch.zeros(9, 1), torch.eye(9)], 4)
    torch.testing.assert_close(found.T @ found, torch.eye(4).double())
    span = found[:, :2] @ (found[:, :2].T @ one.double())
    torch.testing.assert_close(span, one.double())
    with pytest.raises(ValueError, match="2 independent"):
        independent([one, one], 3)


def test_sketches_of_other_bases_do_not_mix():
    used, other = basis(), basis(seed=2)
    one, two = Sketch.of(LAYOUT, used, change()), Sketch.of(LAYOUT, other, change())
    for act in (lambda: one + two, lambda: one.inner(two), lambda: one.reconstruct(other)):
        with pytest.raises(ValueError, match="bas"):
            act()
    with pytest.raises(ValueError, match="basis"):
        other.refined(one)
    with pytest.raises(ValueError, match="norm"):
        Sketch.of(LAYOUT, Basis.random(LAYOUT, ["first"], 1, 3, 3), {"norm": torch.ones(5)})


def test_the_check_of_a_basis_names_what_is_wrong():
    used = basis()
    sketch = Sketch.of(LAYOUT, used, change())
    used.check(sketch)
    used.check(Sketch.of(LAYOUT, used, {"first": change()["first"]}))
    digest = used.digest
    p, r = sketch.views["first"].P, sketch.views["first"].R
    cases = {
        Verdict.WRONG_BASIS: Sketch(LAYOUT, "0" * 64, {"first": (p, r)}),
        Verdict.SHAPE: Sketch(LAYOUT, digest, {"first": (p[:, :2], r)}),
        Verdict.WRONG_LAYOUT: Sketch(Layout({"first": (40, 30)}), digest, {"first": (p, r)}),
    }
    for verdict, wrong in cases.items():
        with pytest.raises(UpdateRejected) as refusal:
            used.check(wrong)
        assert refusal.value.verdict is verdict
    for wrong in (
        Sketch(LAYOUT, digest, {}, {"first": torch.ones(40, 30)}),
        Sketch(LAYOUT, digest, {"small": (torch.ones(4, 1), torch.ones(4, 1))}),
    ):
        with pytest.raises(UpdateRejected) as refusal:
            used.check(wrong)
        assert refusal.value.verdict is Verdict.UNKNOWN_TENSOR


@pytest.mark.parametrize("dtype", sorted(WIRE_DTYPES))
@pytest.mark.parametrize("magnitude", [1.0, 1e-12])
def test_short_types_keep_small_columns(dtype, magnitude):
    """Coordinates of a gradient are often below float16's smallest number."""
    sketch = Sketch.of(LAYOUT, basis(), change(magnitude=magnitude))
    again = decode(encode(sketch, dtype), LAYOUT).dense()
    for key, tensor in sketch.dense().items():
        assert relative_error(again[key], tensor) <= 0.02


def test_bytes_are_those_of_the_numbers():
    layout = Layout({f"layer.{n}.weight": (96, 64) for n in range(30)})
    used = Basis.random(layout, [spec.name for spec in layout], 1, 4, 4)
    sketch = Sketch.of(layout, used, {s.name: torch.ones(s.shape) for s in layout})
    assert len(encode(sketch, "int8")) <= 1.1 * used.size


def hostile(spoil, dtype="float16"):
    header, tensors = unpack(encode(Sketch.of(LAYOUT, basis(), change()), dtype))
    spoil(header, tensors)
    with pytest.raises(UpdateRejected) as refusal:
        decode(pack(header, tensors), LAYOUT)
    return refusal.value.verdict


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (lambda h, t: h.update(basis="12"), Verdict.MALFORMED),
        (lambda h, t: h.update(basis=7), Verdict.MALFORMED),
        (lambda h, t: h.update(basis="G" * 64), Verdict.MALFORMED),
        (lambda h, t: h.update(layout="0" * 64), Verdict.WRONG_LAYOUT),
        (lambda h, t: t.pop("ids"), Verdict.MALFORMED),
        (lambda h, t: t.pop("widths"), Verdict.MALFORMED),
        (lambda h, t: t.pop("whole"), Verdict.MALFORMED),
        (lambda h, t: t.pop("numbers"), Verdict.MALFORMED),
        (lambda h, t: t.pop("largest"), Verdict.DTYPE),
        (lambda h, t: t.update(more=torch.ones(1)), Verdict.UNKNOWN_TENSOR),
        (lambda h, t: t.update(ids=t["ids"].flip(0)), Verdict.UNKNOWN_TENSOR),
        (lambda h, t: t.update(ids=t["ids"] + 9), Verdict.UNKNOWN_TENSOR),
        (lambda h, t: t.update(ids=t["ids"].long()), Verdict.DTYPE),
        (lambda h, t: t.update(ids=t["whole"]), Verdict.MALFORMED),
        (lambda h, t: t.update(ids=t["ids"] + 1, whole=t["whole"][:0]), Verdict.SHAPE),
        (lambda h, t: t.update(whole=t["whole"] * 0), Verdict.UNKNOWN_TENSOR),
        (lambda h, t: t.update(widths=t["widths"] + 1), Verdict.SHAPE),
        (lambda h, t: t.update(widths=t["widths"].flip(1)), Verdict.SHAPE),
        (lambda h, t: t.update(widths=t["widths"] * 0), Verdict.SHAPE),
        (lambda h, t: t.update(widths=t["widths"] * -1), Verdict.SHAPE),
        (lambda h, t: t.update(widths=t["widths"] * 0 + 2**30), Verdict.SHAPE),
        (lambda h, t: t.update(widths=t["widths"][:1]), Verdict.SHAPE),
        (lambda h, t: t.update(numbers=t["numbers"][:-1]), Verdict.SHAPE),
        (lambda h, t: t.update(numbers=t["numbers"].reshape(1, -1)), Verdict.SHAPE),
        (lambda h, t: t["numbers"].fill_(math.nan), Verdict.NOT_FINITE),
        (lambda h, t: t["largest"].fill_(math.inf), Verdict.NOT_FINITE),
        (lambda h, t: t.update(numbers=t["numbers"].to(torch.int32)), Verdict.DTYPE),
    ],
)
def test_hostile_bytes_have_a_verdict(spoil, verdict):
    assert hostile(spoil) is verdict


@given(data=st.data())
def test_ill_chosen_parts_are_sketches_or_refused(data):
    header, tensors = unpack(encode(Sketch.of(LAYOUT, basis(), change()), "int8"))
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=3)):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = data.draw(st.sampled_from([torch.int8, torch.int32, torch.float32, torch.float16]))
        fill = data.draw(st.sampled_from([-1, 0, 1, 3]))
        tensors[key] = torch.full(shape, fill, dtype=dtype)
    try:
        found = decode(pack(header, tensors), LAYOUT)
    except UpdateRejected:
        return
    assert isinstance(found, Sketch)
