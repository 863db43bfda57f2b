"""The benchmark of mixed cohorts: limits decide its strands, and what it has shown is not run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedserver.configuration import parse
from simulations.benchmarks import cohort_place
from simulations.benchmarks.cohort_place import HIDDEN, LAYERS, Place
from simulations.benchmarks.cohort_tables import COHORTS, Outcome, advantages, losses
from simulations.benchmarks.mixed_cohorts import NODES, TUNING_SEED, families
from simulations.benchmarks.small_language import write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The benchmark's data, and its model after one step instead of hundreds."""
    found = Place.make(tmp_path_factory.mktemp("place"), tuple(NODES), {})
    folder = found.folder / f"model-{found.data.stem}-{TUNING_SEED}"
    write_model(folder, found.words, found.read[:16], 1, steps=1, hidden=HIDDEN, layers=LAYERS)
    return found


def test_limits_of_memory_and_link_decide_the_strands(place: Place) -> None:
    fleet, reasons = families(place, rounds=1)
    assert {family: list(nodes) for family, nodes in fleet.items()} == {
        "lora": ["workstation-1", "workstation-2"],
        "projected": ["laptop-1", "laptop-2"],
        "zeroth-order": ["phone-1", "phone-2"],
    }
    assert set(reasons) == set(NODES)


def test_a_run_that_is_known_is_not_made_again(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the same place, nor by the next one, not even where the last line was cut off."""
    place = Place.make(tmp_path, tuple(NODES), {})
    asked = parse(
        {
            "base_model": str(tiny_model_folder), "preset": "mixed", "rounds": 1, "threads": 1,
            "max_length": 16, "local_steps": 1, "lora_r": 1,
            "data": {"source": str(place.data), "held_out_max": 2},
            "nodes": [{"name": "a"}, {"name": "b", "strand": "zeroth-order"}],
            "mixing": {"rule": "overlap"}, "zeroth_order": {"local_steps": 1},
        }
    )  # fmt: skip
    made = place.run(asked, "a run")
    assert set(made.before) == set(made.after) == {"a", "b"}
    assert [set(one) for one in made.lambdas] == [{"low_rank", "seed_scalars"}]

    lines = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(lines + lines[: len(lines) // 2])
    again = Place.make(tmp_path, tuple(NODES), {})
    monkeypatch.setattr(cohort_place, "simulate", None)
    assert again.run(asked, "the same") == made
    assert (tmp_path / "runs.jsonl").read_text() == lines
    with pytest.raises(TypeError):
        again.run(asked.model_copy(update={"rounds": 2}), "another")


@given(
    seeds=st.integers(2, 4),
    gain=st.floats(0.01, 2.0),
    base=st.lists(st.floats(2.0, 6.0), min_size=4, max_size=4),
)
def test_differences_are_seed_by_seed(seeds: int, gain: float, base: list[float]) -> None:
    """However far apart the seeds are: an equal difference in each has an interval of width 0."""
    outcomes = [
        Outcome(
            seed, unlike=True, cohort=cohort, before=7.0, strong=base[seed],
            everyone=base[seed] + (0.0 if group == "all" and rule != "mean" else gain),
        )
        for cohort, (group, rule) in COHORTS.items()
        for seed in range(seeds)
    ]  # fmt: skip
    table: Any = advantages(outcomes[::-1])
    cells = [list(column.cells) for column in table.columns[1:4]]
    assert cells == [[f"{gain:+.3f} ± 0.000 ({seeds} of {seeds})"] * 2] * 3
    over: Any = losses(outcomes).columns[3]
    assert set(over.cells) == {"", "+0.0 ± 0.0 (at most +0.0)"}
