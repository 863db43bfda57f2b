"""Real processes that are stopped with Ctrl-C, or whose output nobody reads to its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedserver.ledger import Ledger

# A shell that starts this in the background has SIGINT ignored, and children inherit that.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from simulations.command import main
main()
"""
SCENARIO = """
base_model = "{model}"
rounds = 1000
seed = 9
threads = 1
local_steps = 1
max_length = 48
lora_r = 2

[data]
source = "{data}"
held_out_max = 3
limit_per_node = 16

[[nodes]]
name = "a"

[[nodes]]
name = "b"
"""


@pytest.fixture
def scenario(tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO.format(model=tiny_model_folder, data=tiny_data_file))
    return path


def started(*words: object) -> subprocess.Popen[str]:
    """``fedbraid WORDS`` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stopped_after_a_round(*words: object) -> tuple[int, str]:
    """Exit code and stderr of a process that gets SIGINT when its first round is committed."""
    with started(*words) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "round_committed":
                process.send_signal(signal.SIGINT)
                break
        _, error = process.communicate()
    return process.returncode, error


def rounds(folder: Path) -> int:
    ledger = Ledger(folder)
    try:
        assert ledger.verify() == []
        return sum(1 for _ in ledger.entries("round"))
    finally:
        ledger.close()


def test_a_simulation_that_was_stopped_says_how_to_continue_it(
    scenario: Path, tmp_path: Path
) -> None:
    words = ["simulate", scenario, "--output", tmp_path / "run", "--samples", 0, "--json"]
    code, error = stopped_after_a_round(*words)
    assert code == 130
    assert "--resume" in error
    assert "Traceback" not in error
    done = rounds(tmp_path / "run")
    with started(*words, "--resume", "--set", f"rounds={done + 1}") as process:
        process.communicate()
    assert process.returncode == 0
    assert rounds(tmp_path / "run") == done + 1


def test_a_comparison_that_was_stopped_is_continued_by_the_same_command(
    scenario: Path, tmp_path: Path
) -> None:
    words = ["compare", "braid", "--scenario", scenario, "--output", tmp_path, "--seeds", 1]
    code, error = stopped_after_a_round(*words, "--json")
    assert code == 130
    assert "same command" in error
    assert "--resume" not in error
    done = rounds(tmp_path / "braid-seed9")
    with started(*words, "--json", "--set", f"rounds={done + 1}") as process:
        process.communicate()
    assert process.returncode == 0
    assert rounds(tmp_path / "braid-seed9") == done + 1


@pytest.mark.parametrize("form", [["--json"], []])
def test_a_reader_that_leaves_ends_a_simulation_quietly(
    form: list[str], scenario: Path, tmp_path: Path
) -> None:
    with started("simulate", scenario, "--output", tmp_path / "run", *form) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        error = process.stderr.read()
        code = process.wait()
    assert code == 141  # as of any program that SIGPIPE ends
    assert not error.strip()


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), (["simulate", "--help"], 0), (["simulate", "--nope"], 2),
                        (["smulate"], 2), (["simulate"], 2), (["doctor", "x"], 2)]
)  # fmt: skip
def test_help_and_usage_errors_keep_their_exit_codes(words: list[str], code: int) -> None:
    with started(*words) as process:
        out, error = process.communicate()
    assert process.returncode == code
    assert bool(out) == (code == 0)
    assert ("Usage" in error) == (code == 2)
    assert "Traceback" not in error
