"""Probes have the same bits everywhere, unit variance, and nothing in common with each other."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedkernels as fk
from fedkernels.reference import probes as reference
from fedkernels.reference.fma import fma

SEEDS = st.integers(0, 2**64 - 1)
TENSOR_IDS = st.integers(0, 2**64 - 2)
SHAPES = st.lists(st.integers(0, 20), max_size=3).map(tuple)

# The fixture only selects a backend: it carries nothing from one example to the next.
every_backend = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50
)


PROBES = pytest.mark.parametrize("probe", fk.PROBES)


@PROBES
@settings(max_examples=100)
@given(seed=SEEDS, tensor_id=TENSOR_IDS, shape=SHAPES)
def test_every_backend_has_the_bits_of_the_reference(probe, seed, tensor_id, shape):
    before, found = fk.backend(), {}
    for backend in fk.backends():
        fk.use_backend(backend)
        values = fk.noise(seed, tensor_id, shape, probe)
        assert (values.shape, values.dtype) == (shape, torch.float32)
        found[backend] = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    fk.use_backend(before)
    assert set(found.values()) == {found["reference"]}, found


def words_at(seed: int, tensor_id: int, block: int) -> tuple[int, int, int, int]:
    """Return the words of one block straight from the definition, in Python integers."""
    halves = [value >> shift & 0xFFFFFFFF for value in (block, tensor_id) for shift in (0, 32)]
    return reference.philox4x32(tuple(halves), (seed & 0xFFFFFFFF, seed >> 32))


def sign(seed: int, tensor_id: int, stream: int, index: int) -> float:
    word = words_at(seed, tensor_id, stream + index // 128)[index // 32 % 4]
    return 1.0 - 2.0 * (word >> index % 32 & 1)


@every_backend
@given(seed=SEEDS, tensor_id=TENSOR_IDS, offset=st.integers(0, 2**41), count=st.integers(1, 30))
def test_integer_probes_are_the_bits_that_the_definition_names(
    backend, seed, tensor_id, offset, count
):
    # block indices outgrow a word: 2**41 / 128 > 2**32
    width = 700
    part = fk.Part((2**41 // width + 2, width), offset=offset)
    rademacher, popcount, rank1 = (
        fk.noise(seed, tensor_id, (count,), probe, part)
        for probe in ("rademacher", "popcount", "rank1")
    )
    for i in range(count):
        g = offset + i
        assert rademacher[i] == sign(seed, tensor_id, 0, g)
        set_bits = words_at(seed, tensor_id, g // 4)[g % 4].bit_count()
        assert popcount[i] == torch.tensor(set_bits - 16.0) * torch.tensor(8**-0.5)
        row, column = divmod(g, width)
        expected = sign(seed, tensor_id, 2**63, row)
        assert rank1[i] == expected * sign(seed, tensor_id, 2**63 + 2**62, column)


@PROBES
def test_elements_that_are_made_apart_join_without_a_seam(monkeypatch, probe):
    elements = torch.arange(1000)
    whole = reference.noise(5, 6, probe, (10, 100), elements)
    monkeypatch.setattr(reference, "ELEMENTS_AT_ONCE", 33)
    assert torch.equal(reference.noise(5, 6, probe, (10, 100), elements), whole)


def test_gaussian_probes_are_normally_distributed(backend):
    count = 1 << 18 if backend != "reference" else 1 << 14
    z = fk.noise(11, 3, (count,), "gaussian").double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / count)
    for limit in (0.5, 1.0, 2.0, 3.0, 4.0):
        tail = math.erfc(limit / math.sqrt(2))
        found = (z.abs() > limit).double().mean()
        assert abs(found - tail) < 5 * math.sqrt(tail / count)
    cumulative = torch.special.ndtr(z.sort().values)
    steps = (torch.arange(count) + 0.5) / count
    assert (cumulative - steps).abs().max() * math.sqrt(count) < 2.0  # Kolmogorov: p = 7e-4
    even, odd = z.view(-1, 2).T  # one pair of words makes both
    assert abs((even * odd).mean()) < 5 / math.sqrt(count / 2)
    assert abs((even**2 * odd**2).mean() - 1) < 5 * math.sqrt(8 / (count / 2))


@given(
    st.lists(
        st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 3), min_size=1
    )
)
def test_fma_rounds_once(triples):
    a, b, c = torch.tensor(triples).T.contiguous()
    found = fma(a, b, c).tolist()
    for (x, y, z), value in zip(triples, found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        if math.isinf(value):
            assert abs(exact) >= 2**128 - 2**103
            continue
        for direction in (-math.inf, math.inf):
            beside = torch.nextafter(torch.tensor(value), torch.tensor(direction)).item()
            if not math.isinf(beside):
                assert abs(exact - Fraction(value)) <= abs(exact - Fraction(beside))


@every_backend
@given(SEEDS, TENSOR_IDS, st.integers(0, 9), st.integers(0, 9), st.integers(1, 40))
def test_the_first_rows_do_not_depend_on_how_many_follow(
    backend, seed, tensor_id, rows, more, columns
):
    longer = fk.noise(seed, tensor_id, (rows + more, columns))
    assert torch.equal(fk.noise(seed, tensor_id, (rows, columns)), longer[:rows])


def test_probes_are_balanced_and_unrelated(backend):
    count = 40_000 if backend != "reference" else 5_000
    probes = torch.stack([fk.noise(s, t, (count,)) for s in (1, 2, 2**40) for t in (0, 1, 2**33)])
    assert torch.equal(probes.abs(), torch.ones_like(probes))
    correlation = (probes.double() @ probes.double().T) / probes.shape[1]
    limit = 5 / math.sqrt(probes.shape[1])  # five standard deviations
    assert (correlation - torch.eye(len(probes))).abs().max() < limit
    assert probes.mean(dim=1).abs().max() < limit


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-1, 0, (2,)), "seed"),
        ((2**64, 0, (2,)), "seed"),
        ((0, -1, (2,)), "tensor_id"),
        ((0, 2**64 - 1, (2,)), "tensor_id"),
        ((0, 0, (2, -1)), "shape"),
        ((0, 0, (2,), "cauchy"), "rademacher"),
    ],
)
def test_what_no_probe_has_is_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        fk.noise(*arguments)


def test_derived_seeds_stay_as_they_are():
    assert [fk.derive_seed(0, 0), fk.derive_seed(5, 7), fk.derive_seed(2**64 - 1, 2**64 - 1)] == [
        130734006315786659,
        7094870055028817717,
        4740103540206151533,
    ]


@given(SEEDS, st.sets(SEEDS, min_size=2, max_size=20))
def test_derived_seeds_are_distinct_and_fit_a_signed_word(master_seed, indices):
    seeds = {fk.derive_seed(master_seed, index) for index in indices}
    assert len(seeds) == len(indices)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("arguments", [(-1, 0), (0, -1), (2**64, 0), (0, 2**64)])
def test_a_seed_is_derived_from_64_bits(arguments):
    with pytest.raises(ValueError, match="must be in"):
        fk.derive_seed(*arguments)
