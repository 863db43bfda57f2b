"""Same scenario, same seed, any engine: one ledger head."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fedserver.configuration import load
from simulations.run import ledger_head, simulate


def test_ray_ends_with_the_local_engines_head(tiny_scenario: Path, tmp_path: Path) -> None:
    simulate(load(str(tiny_scenario)), tmp_path / "local", lambda event: None, samples=0)
    command = [str(Path(sys.executable).parent / "fedbraid"), "simulate", str(tiny_scenario)]
    # Ray keeps threads and processes of its own: it gets a process of its own.
    subprocess.run(
        [*command, "--engine", "flower", "--output", str(tmp_path / "ray"), "--samples", "0"],
        check=True, capture_output=True, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert ledger_head(tmp_path / "ray") == ledger_head(tmp_path / "local")


def test_the_seed_decides_the_head_and_the_folder_does_not(
    tiny_scenario: Path, tmp_path: Path
) -> None:
    heads = {}
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        configuration = load(str(tiny_scenario), ["rounds=1", f"seed={seed}"])
        simulate(configuration, tmp_path / name, lambda event: None, samples=0)
        heads[name] = ledger_head(tmp_path / name)
    assert heads["one"] == heads["again"] != heads["other"]


def test_metrics_tell_what_the_ledger_holds(tiny_scenario: Path, tmp_path: Path) -> None:
    summary = simulate(load(str(tiny_scenario)), tmp_path / "run", lambda event: None, samples=2)
    lines = [json.loads(line) for line in _lines(tmp_path / "run")]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert lines[-1]["eval_loss"] == summary["after"]["loss"]
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["head"] == ledger_head(tmp_path / "run")
    assert all(line["accepted"] == 2 and line["families"] == {"low_rank": 2} for line in lines)
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert len(samples) == 2
    for name in ("report.html", "scenario.toml", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_later_rounds_continue_a_finished_run(tiny_scenario: Path, tmp_path: Path) -> None:
    longer = load(str(tiny_scenario), ["rounds=3"])
    simulate(longer, tmp_path / "whole", lambda event: None, samples=0)
    simulate(
        load(str(tiny_scenario), ["rounds=2"]), tmp_path / "run", lambda event: None, samples=0
    )
    simulate(longer, tmp_path / "run", lambda event: None, resume=True, samples=0)
    states = []
    for name in ("whole", "run"):
        found = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        states.append([json.loads(line)["eval_loss"] for line in found])
    assert states[0] == states[1]


def _lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()
