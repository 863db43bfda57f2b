"""docs/deployment.md shows commands from nothing to a run: here they are run as they are printed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedhost.ports import LOOPBACK, free_ports
from fedhost.supervision import stop
from simulations.benchmarks.fresh_install import HEAD, PAGE, documented_commands, run_in_one_shell
from simulations.tiny_model import write_mixed_scenario

INSTALLING = 2


def test_the_documented_commands_work(tmp_path: Path) -> None:
    commands = documented_commands(PAGE.read_text(encoding="utf-8"))
    assert len(commands) <= 10
    assert "venv" in commands[0]
    assert "pip install" in commands[1]
    scenario = write_mixed_scenario(tmp_path / "scenario", "fresh", ("clinic", "phone"), 1)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "FEDBRAID_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    own = {"SCENARIO": str(scenario), "NAME": "fresh", "127.0.0.1:8443": free_address()}
    for word, meant in own.items():
        commands = [command.replace(word, meant) for command in commands]
    try:
        steps = run_in_one_shell(commands[INSTALLING:], tmp_path, environment)
        told = "\n".join(f"$ {step.command}\n{step.output}" for step in steps)
        assert [step.code for step in steps] == [0] * len(commands[INSTALLING:]), told
        assert HEAD.search(told), told
    finally:
        for folder in ("clinic", "phone", "srv"):
            stop(tmp_path / folder)


def free_address() -> str:
    return f"{LOOPBACK}:{free_ports(1)[0]}"
