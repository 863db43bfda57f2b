"""A run that its operator leaves goes on; one that is stopped commits no more until it is resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedhost.ports import LOOPBACK, free_ports
from fedhost.supervision import status_of, stop
from fedserver.configuration import load
from fedserver.deployment.runs import told
from fedserver.live_log import is_running
from simulations.run import ledger_head, simulate
from simulations.tiny_model import write_mixed_scenario

ROUNDS = 6
NODES = ("clinic", "phone")
PATIENCE_SECONDS = 240.0


class Operator:
    """Who types the commands. ``folder``: of the server and the devices."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        cache = str(folder / "cache")
        self._environment = os.environ | {"FEDBRAID_CACHE": cache, "HF_HUB_OFFLINE": "1"}

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Begin a command."""
        return subprocess.Popen(
            [sys.executable, "-m", "simulations.command", *map(str, words)],
            env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # A shell that runs tests in the background lets them ignore Ctrl-C, and what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def says(self, *words: object, code: int = 0) -> str:
        """What a command prints, which ends with that exit code."""
        process = self.start(*words)
        printed, complaint = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == code, printed + complaint
        return printed + complaint


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    yield Operator(tmp_path)
    for folder in (*NODES, "server"):
        stop(tmp_path / folder)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def vanish(device: Path) -> None:
    """What a cut of its power does to a device."""
    found = status_of(device)
    assert found is not None
    for pid in (found["pid"], found["children"]["supernode"]["pid"]):
        os.kill(pid, signal.SIGKILL)


def test_a_run_is_left_and_stopped_and_resumed(operator: Operator, tmp_path: Path) -> None:
    scenario = write_mixed_scenario(tmp_path / "scenario", "stopped", NODES, ROUNDS)
    server = tmp_path / "server"
    run = server / "runs" / "stopped"
    operator.says("server", "up", server, "--listen", f"{LOOPBACK}:{free_ports(1)[0]}")
    for partition, name in enumerate(NODES):
        join = operator.says("server", "invite", server, name).split()[1:]
        operator.says(*join, "--folder", tmp_path / name, "--partition", partition)
    operator.says("client", "run", "--background", "--folder", tmp_path / "clinic")

    shown = operator.start("server", "run", server, scenario)
    assert shown.stdout is not None
    waits = [shown.stdout.readline(), shown.stdout.readline()][-1]
    assert "waits for phone (not connected)" in waits
    operator.says("client", "run", "--background", "--folder", tmp_path / "phone")
    until(lambda: told(run).get("committed", 0) >= 1)
    # From now on its rounds wait for a node that is not there.
    vanish(tmp_path / "phone")
    assert "under way" in operator.says("server", "down", server, code=2)
    assert "under way" in operator.says("server", "run", server, scenario, code=2)
    # Who leaves it does not end it.
    shown.send_signal(signal.SIGINT)
    printed, complaint = shown.communicate(timeout=PATIENCE_SECONDS)
    assert shown.returncode == 130
    assert "the run goes on" in complaint
    assert "round 1/6" in printed
    assert is_running(told(run))
    assert "run stopped is under way" in operator.says("server", "status", server)

    said = operator.says("server", "stop", server)
    assert not is_running(told(run))
    height, head = told(run)["committed"], ledger_head(run)
    assert f"after round {height} of {ROUNDS}" in said
    assert height < ROUNDS
    assert "no run is under way" in operator.says("server", "stop", server, code=2)
    assert "--resume" in operator.says("server", "run", server, scenario, code=2)
    assert ledger_head(run) == head
    told_by = status_of(server)
    assert told_by is not None
    executor = psutil.Process(told_by["children"]["superexec"]["pid"])
    until(lambda: executor.children() == [])

    operator.says("client", "run", "--background", "--folder", tmp_path / "phone")
    resumed = operator.says("server", "run", server, scenario, "--resume")
    assert f"resumes from round {height + 1}" in resumed
    simulate(load(str(scenario), []), tmp_path / "whole", lambda event: None, samples=0)
    assert ledger_head(run) == ledger_head(tmp_path / "whole")
    operator.says("server", "down", server)
