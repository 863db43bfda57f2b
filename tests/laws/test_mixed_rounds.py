"""Law 2 over rounds: random mixtures of all families, folded into the state and read from its view.

The oracle is the mixing rule by its definition: dense changes in float64, the weighted mean within a
family, families added. Everything that the fast path does on the way (bytes, stacks, a recompressed
carry, integer sums, one rounding) has to come out at the same weights, within 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import (
    Basis,
    Layout,
    LowRank,
    ProjectedGradient,
    SeedScalars,
    Sketch,
    decode,
    encode,
)
from aggregators.presets import PRESETS
from aggregators.projected import shrinkage
from fedserver.configuration import RunConfiguration, parse
from fedserver.global_model import GlobalModel, first_basis, next_model

LAYOUT = Layout(
    {"embed.weight": (6, 5), "a.q_proj.weight": (9, 5), "norm.weight": (5,), "b.up.weight": (5, 8)}
)
MATRICES = ("a.q_proj.weight", "b.up.weight")
POOL, TOLERANCE = 32, 1e-5
FAMILIES = ("low_rank", "seed_scalars", "first_order")


def configuration(
    basis: str, scale: str, rule: str, weights: dict[str, float], within: bool
) -> RunConfiguration:
    return parse(
        {
            "name": "law",
            "base_model": "none",
            "preset": "mixed",
            "lora_target_modules": ["all-linear"],
            "zeroth_order": {"pool_size": POOL, "learning_rate": 1e-2},
            "projected": {
                "basis": basis,
                "scale": scale,
                "rank": 2,
                "oversampling": 2,
                "within_basis": within,
                "error_feedback": scale == "mmse",
            },
            "mixing": {"rule": rule, "weights": weights},
            "data": {"source": "chatterbot"},
            "nodes": [
                {"name": "one"},
                {"name": "two", "strand": "projected"},
                {"name": "three", "strand": "zeroth-order"},
            ],
        }
    )


@dataclass
class Cohorts:
    """Draws nodes' updates from one generator, which Hypothesis seeds."""

    generator: torch.Generator = field(default_factory=torch.Generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def update(self, family: str, asked: RunConfiguration, basis: Basis | None, number: int) -> Any:
        # Some nodes say nothing of some tensors, as hybrid ones and those that train a subset.
        left_out = {spec.name for spec in LAYOUT if float(self.normal(1)) > 1} - {MATRICES[0]}
        if family == "low_rank":
            rank = int(torch.randint(1, 5, (), generator=self.generator))
            return LowRank(
                LAYOUT,
                {
                    name: (
                        self.normal(LAYOUT.shape(name)[0], rank).float(),
                        self.normal(rank, LAYOUT.shape(name)[1]).float(),
                        0.5 / rank,
                    )
                    for name in MATRICES
                    if name not in left_out
                },
            )
        if family == "seed_scalars":
            used = int(torch.randint(1, POOL, (), generator=self.generator))
            indices = sorted(torch.randperm(POOL, generator=self.generator)[:used].tolist())
            return SeedScalars(LAYOUT, 5, POOL, indices, self.normal(used), "rank1")
        if basis is None:
            counts = {spec.name: 3 + spec.tensor_id for spec in LAYOUT}
            values = {
                name: self.normal(count) for name, count in counts.items() if name not in left_out
            }
            return ProjectedGradient(LAYOUT, 100 + number, values, "rademacher")
        change = {
            spec.name: self.normal(*spec.shape) for spec in LAYOUT if spec.name not in left_out
        }
        return Sketch.of(LAYOUT, basis, change)


def oracle(
    cohort: list[tuple[Any, int]], asked: RunConfiguration, basis: Basis | None
) -> dict[str, torch.Tensor]:
    strands = {LowRank: "lora", SeedScalars: "zeroth-order"}
    total = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in LAYOUT}
    kinds = {type(update) for update, _ in cohort}
    for kind in kinds:
        members = [(u, n) for u, n in cohort if type(u) is kind]
        factor = asked.mixing.weights.get(strands.get(kind, "projected"), 1.0)
        for spec in LAYOUT:
            # What is left out of a family's mean is not 0 in it.
            held = [(u, n) for u, n in members if spec.name in touched(u)]
            if not held:
                continue
            examples = sum(n for _, n in (held if asked.mixing.rule == "add" else cohort))
            parts = [u * (factor * n / examples) for u, n in held]
            mean = parts[0]
            for part in parts[1:]:
                mean = mean + part
            change = dense(mean, asked, basis).get(spec.name)
            if change is not None:
                total[spec.name] = total[spec.name] + change
    return total


def touched(update: Any) -> set[str]:
    return {name.partition("#")[0] for name in update.dense()}


def dense(mean: Any, asked: RunConfiguration, basis: Basis | None) -> dict[str, torch.Tensor]:
    if isinstance(mean, Sketch):
        assert basis is not None
        read = mean.reconstruct(basis, asked.projected.within)
        return {**read.dense(), **mean.whole_change().dense()}
    found: dict[str, torch.Tensor] = mean.dense()
    if isinstance(mean, ProjectedGradient) and asked.projected.scale == "mmse":
        for name, count in mean.counts.items():
            found[name] = found[name] * shrinkage(count, found[name].numel(), mean.probe)
    return found


@pytest.mark.parametrize("basis", ["adaptive", "random"])
@settings(max_examples=40)
@given(
    rounds=st.lists(
        st.lists(
            st.tuples(st.sampled_from(FAMILIES), st.integers(1, 10_000)), min_size=1, max_size=6
        ),
        min_size=1,
        max_size=4,
    ),
    rule=st.sampled_from(["add", "mean"]),
    scale=st.sampled_from(["mmse", "unbiased"]),
    within=st.booleans(),
    weights=st.dictionaries(
        st.sampled_from(["lora", "projected", "zeroth-order"]), st.floats(0.1, 4)
    ),
    seed=st.integers(0, 2**32),
)
def test_the_view_is_the_mixing_rule_applied_to_dense_changes(
    basis: str,
    rounds: Any,
    rule: str,
    scale: str,
    within: bool,
    weights: dict[str, float],
    seed: int,
) -> None:
    asked = configuration(basis, scale, rule, weights, within)
    cohorts = Cohorts(torch.Generator().manual_seed(seed))
    model = GlobalModel.empty(LAYOUT)
    expected = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in LAYOUT}
    size = 0.0
    for number, drawn in enumerate(rounds):
        in_use = model.basis or first_basis(asked, LAYOUT)
        cohort = []
        for family, examples in drawn:
            update = cohorts.update(family, asked, in_use, number)
            cohort.append((decode(encode(update), LAYOUT), examples))
        for name, change in oracle(cohort, asked, in_use).items():
            expected[name] += change
            size += float(change.norm())
        order = torch.randperm(len(cohort), generator=cohorts.generator).tolist()
        following, _ = next_model(model, [cohort[place] for place in order], asked)
        assert following.digest() == next_model(model, cohort, asked)[0].digest()
        model = GlobalModel.from_bytes(following.to_bytes(), LAYOUT)
    view = model.common_view(PRESETS["mixed"], None, None)
    for spec in LAYOUT:
        found = view.moved(spec.name, torch.zeros(spec.shape)).double()
        distance = float((found - expected[spec.name]).norm())
        assert distance <= TOLERANCE * max(float(expected[spec.name].norm()), 0.1 * size), spec.name
