"""Probes have the same bits everywhere, unit variance, and nothing in common with each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedkernels as fk
from fedkernels.reference import probes as reference

SEEDS = st.integers(0, 2**64 - 1)
TENSOR_IDS = st.integers(0, 2**64 - 2)
SHAPES = st.lists(st.integers(0, 20), max_size=3).map(tuple)

# The fixture only selects a backend: it carries nothing from one example to the next.
every_backend = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@every_backend
@given(seed=SEEDS, tensor_id=TENSOR_IDS, shape=SHAPES)
def test_every_backend_has_the_bits_of_the_reference(backend, seed, tensor_id, shape):
    probe = fk.noise(seed, tensor_id, shape)
    assert probe.shape == shape
    assert probe.dtype == torch.float32
    expected = reference.rademacher(seed, tensor_id, math.prod(shape))
    assert torch.equal(probe.flatten(), expected)


def test_an_element_is_the_bit_that_the_definition_names(backend):
    seed, tensor_id = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    probe = fk.noise(seed, tensor_id, (700,))
    key = (0x89ABCDEF, 0x01234567)
    for i, value in enumerate(probe.tolist()):
        words = reference.philox4x32((i // 128, 0, 0x76543210, 0xFEDCBA98), key)
        assert value == (-1.0 if words[i // 32 % 4] >> i % 32 & 1 else 1.0)


def test_blocks_that_are_expanded_apart_join_without_a_seam(monkeypatch):
    whole = reference.rademacher(5, 6, 1000)
    monkeypatch.setattr(reference, "BLOCKS_AT_ONCE", 3)
    assert torch.equal(reference.rademacher(5, 6, 1000), whole)


@every_backend
@given(SEEDS, TENSOR_IDS, st.integers(0, 9), st.integers(0, 9), st.integers(1, 40))
def test_the_first_rows_do_not_depend_on_how_many_follow(
    backend, seed, tensor_id, rows, more, columns
):
    longer = fk.noise(seed, tensor_id, (rows + more, columns))
    assert torch.equal(fk.noise(seed, tensor_id, (rows, columns)), longer[:rows])


def test_probes_are_balanced_and_unrelated(backend):
    probes = torch.stack([fk.noise(s, t, (40_000,)) for s in (1, 2, 2**40) for t in (0, 1, 2**33)])
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
        ((0, 0, (2,), "gaussian"), "rademacher"),
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
