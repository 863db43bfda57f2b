"""The command line as a person uses it: real processes' words, exit codes and files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fedserver.ledger import Ledger
from simulations.command import main

SCENARIO = """
base_model = "{model}"
rounds = 2
seed = 9
threads = 1
local_steps = 2
max_length = 48
lora_r = 4

[data]
source = "{data}"
held_out_max = 3
limit_per_node = 16

[[nodes]]
name = "a"

[[nodes]]
name = "b"
lora_r = 2
"""


@pytest.fixture
def scenario(tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO.format(model=tiny_model_folder, data=tiny_data_file))
    return path


def run(*words: object) -> int:
    """The exit code of ``fedbraid WORDS``."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    code = stopped.value.code
    return 0 if code is None else int(code)


def test_a_run_from_simulate_to_export(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("simulate", scenario, "--output", folder, "--samples", 1, "--json") == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[0]["event"] == "run_started"
    assert said[-1]["event"] == "run_finished"
    head = said[-1]["head"]
    assert run("ledger", "verify", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"head": head, "height": 4, "problems": []}
    assert run("ledger", "show", folder) == 0
    assert head in capsys.readouterr().out
    assert run("ledger", "show", folder, "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert run("ledger", "replay", folder) == 0
    assert capsys.readouterr().out.count(": equal") == 2
    assert run("ledger", "replay", folder, "--json") == 0
    assert all(json.loads(line)["equal"] for line in capsys.readouterr().out.splitlines())
    assert run("export", "peft", folder, "--to", tmp_path / "peft") == 0
    assert run("export", "merged", folder, "--to", tmp_path / "merged", "--exact") == 0
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert run("simulate", folder / "scenario.toml", "--output", tmp_path / "again") == 0
    assert head in capsys.readouterr().out


def test_a_run_without_its_quorum_is_a_failure(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["simulate", scenario, "--output", tmp_path / "run", "--set", "nodes.a.fault=nan"]
    assert run(*words, "--json") == 2
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["event"] == "run_finished"
    assert len(said.err.strip().splitlines()) == 1
    assert "quorum" in said.err
    # One of two rounds is enough for a model that is not the base's.
    words[3] = tmp_path / "again"
    assert run(*words, "--set", "quorum=1", "--json") == 0


def test_a_changed_ledger_fails_verification(scenario: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("simulate", scenario, "--output", folder, "--samples", 0, "--json") == 0
    ledger = Ledger(folder)
    update = next(ledger.entries("round")).content["nodes"][0]["update"]
    ledger.close()
    next((folder / "blobs").glob(f"*/{update}*")).write_bytes(b"forged")
    assert run("ledger", "verify", folder) == 1


def test_folders_are_never_mixed_up(
    scenario: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("simulate", scenario, "--samples", 0) == 0
    assert run("simulate", scenario, "--samples", 0, "--set", "seed=1") == 0
    assert sorted(os.listdir("runs")) == ["small", "small-2"]
    capsys.readouterr()
    for words, expected in (
        (["--output", "runs/small"], "--resume"),
        (["--output", "runs/small", "--set", "seed=4", "--resume"], "another run (different seed)"),
        (["--output", tmp_path], "not empty"),
        (["--output", tmp_path, "--resume"], "not empty"),
        (["--output", scenario], "is a file"),
    ):
        assert run("simulate", scenario, *words) == 2
        assert expected in " ".join(capsys.readouterr().err.split())
    assert run("simulate", scenario, "--set", "seed=1", "--resume", "--samples", 0) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "lora_rank=3"], "did you mean 'lora_r'"),
        (["--set", "lora_r=0"], "lora_r"),
        (["--set", "nodes.a.lora_r=99999"], "exceeds the largest possible rank"),
        (["--set", "base_model=/nowhere"], "/nowhere"),
        (["--set", "data.source=/nowhere.jsonl"], "no such file"),
        (["--set", 'lora_target_modules=["nothing"]'], "match no 2-D weight"),
        (["--engine", "warp"], "unknown engine"),
        (["--set", "preset=fedit", "--set", "server_learning_rate=0.5"], "averages factors"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing_behind(
    words: list[str],
    expected: str,
    scenario: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("simulate", scenario, "--output", tmp_path / "run", *words) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert expected in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_validate_and_schema_tell_the_whole_scenario(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("validate", scenario) == 0
    shown = capsys.readouterr().out
    assert 'preset = "braid"' in shown
    assert run("validate", scenario, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == 2
    assert run("schema") == 0
    assert "lora_r" in json.loads(capsys.readouterr().out)["properties"]


def test_compare_prints_every_preset_and_writes_a_page(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--scenario", scenario, "--seeds", 2, "--output", tmp_path / "c", "--set", "rounds=1"]
    assert run("compare", "braid", "flora", "fedit", "ffa-lora", "flexlora", *words) == 0
    shown = capsys.readouterr().out
    for preset in ("braid", "flora", "fedit", "ffa-lora", "flexlora"):
        assert preset in shown
    assert (tmp_path / "c" / "comparison.html").is_file()
    # Finished runs are reused: the table is the same, and nothing is trained again.
    assert run("compare", "braid", "--json", *words) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["comparison"][0]["seeds"] == 2


def test_compare_says_which_rounds_had_their_quorum(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["braid", "braid+nodes.a.fault=nan"]
    words = ["--scenario", scenario, "--seeds", 1, "--output", tmp_path / "c", "--set", "quorum=1"]
    words += ["--set", "rounds=1", "--set", "nodes.b.trains=false"]
    assert run("compare", *variants, *words, "--json") == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["comparison"]
    assert [(row["rounds_with_quorum"], row["rounds"]) for row in rows] == [(1, 1), (0, 1)]
    assert rows[1]["after"][0] == rows[1]["before"]
    assert run("compare", *variants, *words) == 0
    shown = capsys.readouterr().out
    assert "1 of 1" in shown
    assert "0 of 1" in shown


def test_compare_takes_strands_and_changes(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Presets of one strand are of all nodes; a plus adds a change, unless it is in a number."""
    variants = ["fedkseed", "ferret", "mixed+mixing.rule=mean+zeroth_order.learning_rate=1e+0"]
    words = ["--scenario", scenario, "--seeds", 1, "--output", tmp_path / "c", "--json"]
    changes = [
        "nodes.a.strand=zeroth-order",
        "rounds=1",
        "preset=mixed",
        "projected.coordinates=99",
    ]
    for change in changes:
        words += ["--set", change]
    assert run("compare", *variants, *words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["comparison"]
    assert [row["preset"] for row in found] == variants
    page = (tmp_path / "c" / "comparison.html").read_text(encoding="utf-8")
    assert "mixed+mixing.rule=mean" in page
    (mixed,) = (tmp_path / "c").glob("mixed*")
    resolved = (mixed / "scenario.toml").read_text(encoding="utf-8")
    assert 'rule = "mean"' in resolved
    assert run("compare", "mixed+mixing.rull=mean", *words) == 2
    assert "rule" in capsys.readouterr().err


def test_a_node_that_does_not_train_only_evaluates(scenario: Path, tmp_path: Path) -> None:
    words = ["--output", tmp_path / "run", "--samples", 0, "--set", "nodes.a.trains=false"]
    assert run("simulate", scenario, *words) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, rows):
        a = next(node for node in row["nodes"] if node["node"] == "a")
        assert (a["verdict"], a["train_loss"], a["weight"]) == ("accepted", None, 0.0)
        assert sum(row["families"].values()) == len(row["nodes"]) - 1
    assert run("ledger", "replay", tmp_path / "run") == 0


def test_export_of_a_folder_that_is_no_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", "peft", tmp_path) == 2
    assert "give the folder of a run" in " ".join(capsys.readouterr().err.split())
    assert run("ledger", "show", tmp_path) == 2
    assert "no ledger" in capsys.readouterr().err


def test_a_comparison_without_evaluation_is_refused_before_it_runs(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--scenario", scenario, "--output", tmp_path / "c", "--set", "evaluate=false"]
    assert run("compare", "braid", *words) == 2
    assert "evaluate" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
