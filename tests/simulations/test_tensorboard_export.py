"""What TensorBoard reads is what metrics.jsonl says, and its absence is one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from simulations.command import main

MakeRun = Callable[..., Path]
TAGS = {
    "loss": "loss/training",
    "eval_loss": "loss/evaluation",
    "eval_accuracy": "accuracy/evaluation",
    "bytes_up": "bytes/up",
    "bytes_down": "bytes/down",
    "accepted": "replies/accepted",
    "rejected": "replies/not_accepted",
    "seconds": "round/seconds",
    "carry_rank": "carry/rank",
    "tail_energy": "carry/tail_energy",
}


def test_every_scalar_is_that_of_the_metrics(fake_run: MakeRun, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = fake_run(tmp_path / "run", rounds=5)
    with pytest.raises(SystemExit) as ended:
        main(["export", "tensorboard", str(folder), "--to", str(tmp_path / "board")])
    assert ended.value.code == 0
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for key, tag in TAGS.items():
        found = {event.step: event.value for event in read.Scalars(tag)}
        assert found == pytest.approx(
            {line["round"]: line[key] for line in lines if line[key] is not None}, rel=1e-6
        )
    for name in {node["node"] for node in lines[0]["nodes"]}:
        found = {event.step: event.value for event in read.Scalars(f"node loss/{name}")}
        told = {
            line["round"]: node["train_loss"]
            for line in lines
            for node in line["nodes"]
            if node["node"] == name and node["train_loss"] is not None
        }
        assert found == pytest.approx(told, rel=1e-6)
    times = [event.wall_time for event in read.Scalars("loss/training")]
    for earlier, later, line in zip(times, times[1:], lines[1:], strict=False):
        assert later - earlier == pytest.approx(line["seconds"], abs=1e-3)


def test_without_the_package_it_is_one_line(
    fake_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SystemExit) as ended:
        main(["export", "tensorboard", str(fake_run(tmp_path / "run"))])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "fedbraid[tensorboard]" in told
    assert len(told.strip().splitlines()) == 1
