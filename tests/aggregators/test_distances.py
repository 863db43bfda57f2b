"""Distances from a family's mean, and cosines to the others: those of the dense changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aggregators import (
    Basis,
    Dense,
    FactorScalars,
    Layout,
    LowRank,
    Pair,
    ProjectedGradient,
    SeedScalars,
    Sketch,
)
from aggregators.cohort import joined
from aggregators.distances import Distance, Member, distances, over_median
from aggregators.gate import norm_of
from aggregators.reach import Reach
from aggregators.shared_factors import factor_layout
from aggregators.totals import Total, tensor_of

LAYOUT = Layout({"layers.0.up": (9, 6), "layers.0.norm": (5,), "layers.1.up": (4, 12)})
NAMES = [spec.name for spec in LAYOUT]
MATRICES = [NAMES[0], NAMES[2]]
POOL = 8
BASIS = Basis.random(LAYOUT, NAMES, 1, 2, 1)


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def low_rank(seed, size, kept):
    return LowRank(
        LAYOUT,
        {
            name: (
                normal(seed + i, LAYOUT.shape(name)[0], size).float(),
                normal(seed - i, size, LAYOUT.shape(name)[1]).float(),
                normal(seed, size),
            )
            for i, name in enumerate(MATRICES)
            if kept[i]
        },
    )


def dense(seed, size, kept):
    chosen = [name for name, keep in zip(NAMES, kept, strict=True) if keep]
    return Dense(LAYOUT, {name: normal(seed, *LAYOUT.shape(name)).float() for name in chosen})


def sketch(seed, size, kept):
    chosen = [name for name, keep in zip(NAMES, kept, strict=True) if keep]
    return Sketch.of(LAYOUT, BASIS, {name: normal(seed, *LAYOUT.shape(name)) for name in chosen})


def projected(seed, size, kept):
    chosen = [name for name, keep in zip(NAMES, kept, strict=True) if keep]
    return ProjectedGradient(LAYOUT, 7, {name: normal(seed, 3) for name in chosen})


def own_probes(seed, size, kept):
    chosen = [name for name, keep in zip(NAMES, kept, strict=True) if keep]
    return ProjectedGradient(LAYOUT, seed % 3, {name: normal(seed, 2) for name in chosen})


def along_seeds(layout, seed, size, reach=Reach()):  # noqa: B008
    chosen = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))[:size]
    indices = chosen.sort().values
    return SeedScalars(layout, 7, POOL, indices, normal(seed, len(indices)), reach=reach)


def scalars(seed, size, kept):
    return along_seeds(LAYOUT, seed, size)


def sparse(seed, size, kept):
    return along_seeds(LAYOUT, seed, size, Reach(blocks=2, density=0.5))


def factors(seed, size, kept):
    own = factor_layout(LAYOUT, MATRICES, 2)
    return FactorScalars(LAYOUT, MATRICES, 2, 1.5, 3, along_seeds(own, seed, size))


MAKERS = [low_rank, dense, sketch, projected, own_probes, scalars, sparse, factors]
COHORTS = st.lists(
    st.tuples(
        st.integers(100, 2**32),
        st.integers(1, 7),  # ranks whose sum may be above a matrix's sides
        st.tuples(st.booleans(), st.booleans(), st.booleans()),
        st.floats(0.1, 1e3),  # weight
        st.sampled_from([1e-6, 1.0, 1.0, 1.0, 1e6]),  # length
        st.booleans(),  # whether it is the first one again
    ),
    min_size=1,
    max_size=6,
)


def plainly(update):
    """By tensor, the change: along probes, each on an axis of its own of its mean length."""
    if isinstance(update, ProjectedGradient):
        found = {}
        for name, values in update.coordinates.items():
            axes = found[name] = torch.zeros(POOL, 3, dtype=torch.float64)
            for k, value in enumerate(values):
                length = math.sqrt(math.prod(LAYOUT.shape(name)))
                axes[update.master_seed % POOL, k] = value / len(values) * length
        return {name: axes.flatten() for name, axes in found.items()}
    if isinstance(update, FactorScalars):
        return {key: v * update.scale / math.sqrt(3) for key, v in plainly(update.scalars).items()}
    if isinstance(update, SeedScalars):
        axes = torch.zeros(POOL, dtype=torch.float64)
        for index, scalar in zip(update.indices.tolist(), update.scalars.tolist(), strict=True):
            alone = SeedScalars(
                update.layout, 7, POOL, [index], [1.0], names=update.names, reach=update.reach
            )
            axes[index] = scalar * math.sqrt(alone.expected_squared_norm())
        return {"": axes}
    return {name: change.flatten() for name, change in update.dense().items()}


def oracle(members):
    """The definition, over everything at once."""
    changes = [plainly(member.update) for member in members]
    found = []
    for mine in changes:
        own, away, compared, rest = [], [], [], []
        for name, change in mine.items():
            terms = [
                (member.held.get(tensor_of(name), member.weight), other[name], other is mine)
                for member, other in zip(members, changes, strict=True)
                if name in other
            ]
            mean = sum(w * change for w, change, _ in terms) / sum(w for w, *_ in terms)
            own.append(change)
            away.append(change - mean)
            others = [(w, change) for w, change, me in terms if not me]
            if others:
                compared.append(change)
                rest.append(sum(w * c for w, c in others) / sum(w for w, _ in others))
        empty = [torch.zeros(1, dtype=torch.float64)]
        u, d, v, o = (torch.cat(x or empty) for x in (own, away, compared, rest))
        lengths = float(v.norm() * o.norm())
        cosine = float(v @ o) / lengths if lengths > 0 else None
        found.append((float(u.norm()), float(d.norm()), cosine))
    return found


@settings(max_examples=60)
@given(maker=st.sampled_from(MAKERS), cohort=COHORTS)
@example(  # one 1e12 times as long as the other
    maker=low_rank,
    cohort=[
        (100, 1, (False, True, False), 1.0, 1e-6, False),
        (100, 2, (False, True, False), 0.5, 1e6, False),
    ],
)
def test_they_are_those_of_the_definition(maker, cohort):
    members = []
    for seed, size, kept, weight, length, again in cohort:
        first = cohort[0]
        update = maker(first[0], first[1], first[2]) if again else maker(seed, size, kept)
        members.append(Member(update * (first[4] if again else length), weight))
    found = distances(members, LAYOUT)
    for one, (norm, distance, cosine) in zip(found, oracle(members), strict=True):
        assert one.norm == pytest.approx(norm, rel=1e-9)
        assert one.distance == pytest.approx(distance, rel=1e-6, abs=1e-11 * norm)
        if one.cosine is not None and cosine is not None:
            assert one.cosine == pytest.approx(cosine, abs=1e-6)
        else:
            assert one.cosine is cosine is None


@settings(max_examples=30)
@given(maker=st.sampled_from(MAKERS), cohort=COHORTS)
def test_an_edges_mean_stands_for_its_members(maker, cohort):
    """Whoever adds some of them on the way, the others are as far from the mean, and agree as much."""
    updates = [(maker(seed, size, kept), weight) for seed, size, kept, weight, *_ in cohort]
    (alone, *behind) = updates
    whole = distances([Member(*one) for one in updates], LAYOUT)[0]
    if not behind:
        assert (whole.distance, whole.cosine) == (0.0, None)
        return
    totals = joined(Total.of(*one) for one in behind)
    edge = [Member(total.mean(), total.weight, total.held) for total in totals]
    found = distances([Member(*alone), *edge], LAYOUT)[0]
    assert found.norm == pytest.approx(whole.norm, rel=1e-9)
    assert found.distance == pytest.approx(whole.distance, rel=1e-6, abs=1e-6 * whole.norm)
    if whole.cosine is not None and found.cosine is not None:
        assert found.cosine == pytest.approx(whole.cosine, abs=1e-6)
    else:
        assert found.cosine is whole.cosine is None


@pytest.mark.parametrize("probe", ["rademacher", "rank1", "gaussian"])
def test_along_probes_they_are_nearly_those_of_the_change_itself(probe):
    """Probes are orthogonal on average, and nearly so where there are many more weights than probes."""
    layout = Layout({"up": (96, 128), "down": (128, 96)})
    walks = [SeedScalars(layout, 5, 64, [n, 9, 12], normal(n, 3), probe) for n in range(3)]
    seen = [
        ProjectedGradient(layout, 5, {"up": normal(n, 4), "down": normal(-n - 1, 4)}, probe)
        for n in range(3)
    ]
    for updates in (walks, seen):
        found = distances([Member(update, 1.0 + n) for n, update in enumerate(updates)], layout)
        made = [Member(Dense(layout, u.dense()), 1.0 + n) for n, u in enumerate(updates)]
        for one, exact in zip(found, distances(made, layout), strict=True):
            assert one.norm == pytest.approx(exact.norm, rel=0.1)
            assert one.distance == pytest.approx(exact.distance, rel=0.1)
            assert one.cosine == pytest.approx(exact.cosine, abs=0.1)


def test_norms_are_those_that_the_gate_measures():
    kept = (True, True, True)
    for maker in MAKERS:
        update = maker(2, 3, kept)
        (found,) = distances([Member(update, 2.0)], LAYOUT)
        assert found == Distance(pytest.approx(norm_of(update)), 0.0, None)


def test_one_update_that_is_unlike_stands_out_from_the_median():
    like = [
        dense(n, 0, (True, True, True)) * 0.1 + dense(9, 0, (True, True, True)) for n in range(4)
    ]
    away = distances([Member(u, 1.0) for u in [*like, like[0] * -1.0]], LAYOUT)
    ratios = over_median(away)
    assert sorted(ratios)[2] == 1.0
    assert ratios[-1] == max(ratios) > 3.5
    assert away[-1].cosine < -0.9 < 0.5 < min(one.cosine for one in away[:4])
    assert over_median([Distance(1.0, 0.0, None)]) == [None]
    assert over_median([]) == []


def test_nothing_is_compared_with_nothing():
    """Neither rounding nor a member without a change makes a direction or a distance."""
    kept = (True, True, True)
    for maker in MAKERS:
        update = maker(2, 3, kept)
        found = distances([Member(update * c, w) for c, w in ((1.0, 3.0), (0.0, 0.7))], LAYOUT)
        assert [one.cosine for one in found] == [None, None]
        same = distances([Member(update, w) for w in (0.1, 0.7, 3.0)], LAYOUT)
        assert [one.distance for one in same] == [0.0, 0.0, 0.0]
        assert [one.cosine for one in same] == [pytest.approx(1.0)] * 3


def test_only_what_adds_has_a_mean():
    kept = (True, True, True)
    one, two = scalars(1, 2, kept), dense(1, 2, kept)
    other = SeedScalars(LAYOUT, 8, POOL, [1], [1.0])
    short = ProjectedGradient(LAYOUT, 7, {NAMES[0]: normal(1, 2)})
    for pair in ([one, two], [one, other], [projected(1, 1, kept), short]):
        with pytest.raises(ValueError, match=r"mean|add"):
            distances([Member(update, 1.0) for update in pair], LAYOUT)
    with pytest.raises(ValueError, match="pair"):
        distances([Member(Pair([one, two]), 1.0)], LAYOUT)
    with pytest.raises(ValueError, match="positive"):
        distances([Member(one, 0.0)], LAYOUT)
    assert distances([], LAYOUT) == []
