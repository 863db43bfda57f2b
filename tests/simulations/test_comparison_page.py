"""A comparison groups runs by preset and states means, intervals and paired differences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedserver.intervals import estimate
from simulations.comparison_page import COSTS, comparison, cost_points, final_loss, group
from simulations.run_directory import RunDirectoryError, read_run

MakeRun = Callable[..., Path]


def make_runs(fake_run: MakeRun, folder: Path, **finals: float) -> list[Path]:
    return [
        fake_run(folder / f"{preset}-seed{seed}", preset=preset, seed=seed, final=final, rounds=4)
        for preset, final in finals.items()
        for seed in (1, 2, 3)
    ]


def exact(page: Any) -> set[float]:
    return {float(value) for tag, key, value in page.attributes if (tag, key) == ("data", "value")}


def test_means_and_intervals_over_seeds_are_on_the_page(
    fake_run: MakeRun, tmp_path: Path, outline: Any
) -> None:
    runs = make_runs(fake_run, tmp_path, braid=1.6, fedit=1.9)
    target = comparison(runs, tmp_path / "out" / "comparison.html")
    page = outline(target.read_text(encoding="utf-8"))
    assert page.unbalanced == []
    shown = exact(page)
    finals: dict[str, list[float]] = {}
    for path in runs:
        loss = final_loss(read_run(path))
        assert loss is not None
        assert loss in shown
        assert path.name in page.text
        finals.setdefault(path.name.split("-")[0], []).append(loss)
    for losses in finals.values():
        found = estimate(losses)
        assert found is not None
        assert {found.mean, found.half_width} <= shown
    differences = [b - f for b, f in zip(finals["braid"], finals["fedit"], strict=True)]
    paired = estimate(differences)
    assert paired is not None
    assert {paired.mean, paired.half_width} <= shown
    assert "The lowest mean evaluation loss is that of braid" in page.text


def test_the_page_loads_nothing(fake_run: MakeRun, tmp_path: Path, outline: Any) -> None:
    runs = make_runs(fake_run, tmp_path, braid=1.6)
    page = outline(comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert set(page.values("href")) <= {"data:,"}
    assert page.values("src") == []
    assert "one seed" not in page.text


@pytest.mark.parametrize(
    ("finals", "reading"),
    [
        ({"fedit": 1.9, "braid": 1.2}, "lower"),
        ({"fedit": 1.2, "braid": 1.9}, "higher"),
        ({"fedit": 1.6, "braid": 1.6}, "not told apart"),
    ],
)
def test_paired_differences_are_read_with_their_interval(
    fake_run: MakeRun, tmp_path: Path, outline: Any, finals: dict[str, float], reading: str
) -> None:
    runs = make_runs(fake_run, tmp_path, **finals)
    text = outline(comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert "Seed by seed against fedit" in text
    assert reading in text


def test_a_single_seed_has_no_interval(fake_run: MakeRun, tmp_path: Path, outline: Any) -> None:
    runs = [fake_run(tmp_path / f"{p}-seed1", preset=p) for p in ("braid", "flora")]
    text = outline(comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert "one seed" in text
    assert "one shared seed" in text


def test_unfinished_runs_are_named_and_left_out_of_the_means(
    fake_run: MakeRun, tmp_path: Path, outline: Any
) -> None:
    runs = make_runs(fake_run, tmp_path, braid=1.6)
    (runs[0] / "summary.json").unlink()
    text = outline(comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert "braid-seed1: summary.json is missing" in text


def test_rounds_without_their_quorum_are_named(
    fake_run: MakeRun, tmp_path: Path, outline: Any
) -> None:
    runs = make_runs(fake_run, tmp_path, braid=1.6)
    for run, reached in zip(runs, (4, 1, 0), strict=True):
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        summary |= {"rounds": 4, "rounds_with_quorum": reached}
        (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    text = outline(comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert "braid-seed1:" not in text
    assert "braid-seed2: 1 of 4 rounds reached their quorum" in text
    assert "braid-seed3: 0 of 4 rounds reached their quorum" in text


def test_folders_decide_preset_and_seed_and_other_names_fall_back(
    fake_run: MakeRun, tmp_path: Path
) -> None:
    named = fake_run(tmp_path / "ffa-lora-seed12", preset="braid")
    other = fake_run(tmp_path / "whatever", preset="flora", seed=5)
    groups = group([read_run(named), read_run(other)])
    assert [(g.name, g.members[0].seed) for g in groups] == [("ffa-lora", 12), ("flora", 5)]


def test_hostile_names_stay_text(fake_run: MakeRun, tmp_path: Path, outline: Any) -> None:
    folder = fake_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary["preset"] = summary["head"] = "<script>alert(1)</script>"
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    page = outline(comparison([folder], tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text


def test_nothing_to_compare_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="nothing to compare"):
        comparison([], tmp_path / "c.html")
    with pytest.raises(RunDirectoryError, match="no such run directory"):
        comparison([tmp_path / "absent"], tmp_path / "c.html")


def test_losses_stand_against_what_they_cost(
    fake_run: MakeRun, tmp_path: Path, outline: Any
) -> None:
    """Bytes and devices' time add up over rounds; memory is one number for a run."""
    runs = [read_run(path) for path in make_runs(fake_run, tmp_path, braid=1.6)]
    by_bytes, by_time, by_memory = COSTS
    run = runs[0]
    points = cost_points(run, by_bytes)
    assert [loss for _, loss in points] == [loss for _, loss in run.curve()]
    assert points[0][0] == 0.0
    assert points[-1][0] == sum((r.bytes_up or 0) + (r.bytes_down or 0) for r in run.rounds)
    # The generated runs know no devices: then there is no such chart, and no error.
    assert cost_points(run, by_time) in ((), ((0.0, points[0][1]),))
    assert cost_points(run, by_memory) == ()
    page = outline(comparison(runs_of(runs), tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Loss against bytes" in page.text
    assert page.unbalanced == []


def runs_of(runs: list[Any]) -> list[Path]:
    return [run.path for run in runs]
