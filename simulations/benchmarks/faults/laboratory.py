"""A server and devices that have joined it, each on a host of its own behind a link that can fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedhost.supervision import status_of, stop
from fedserver.configuration import RunConfiguration, load
from fedserver.ledger import Ledger
from fedserver.replay import replay
from simulations.benchmarks.chaos.clock import Clock
from simulations.benchmarks.chaos.host import Disk, Host
from simulations.benchmarks.chaos.link import Link
from simulations.run import ledger_head, simulate
from simulations.tiny_model import write_scenario

SERVER, PORT = "10.77.0.1", 8443
SERVER_DISK_BYTES, DEVICE_DISK_BYTES = 512 << 20, 64 << 20
ROUNDS = 4
# Updates of 40 KB: five seconds of a link of 64 kbit/s.
OVERRIDES = ("signatures=required", "lora_r=24", "view_rank=24", "deadline_seconds=300")
PATIENCE_SECONDS = 900.0
LOOK_SECONDS = 0.2


@dataclass
class Device:
    """A device: its host, its link to the server, its disk, its clock."""

    name: str
    folder: Path
    host: Host
    link: Link
    clock: Clock
    disk: Disk
    environment: dict[str, str]

    def fedbraid(self, *words: str) -> str:
        """The command on this device; returns what it printed."""
        return _run(self.host.command(*_command(*words)), self.environment)

    def start(self) -> None:
        """Take part, as after the device was switched on; returns at once."""
        words = ("client", "run", "--folder", str(self.folder))
        with (self.folder.parent / f"{self.name}.log").open("ab") as log:
            subprocess.Popen(
                self.host.command(*_command(*words)), env=self.environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def cut_power(self) -> None:
        """Kill everything that runs on the device."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        wait_until(lambda: status_of(self.folder) is None)

    def processes(self) -> list[int]:
        """All processes of the device, its supervisor first."""
        told = status_of(self.folder)
        return [told["pid"], *_descendants(told["pid"])] if told else []

    def process(self, child: str) -> int | None:
        """A supervised process: "worker", "supernode", "superexec"; or "model", "stub"."""
        told = status_of(self.folder)
        children = told["children"] if told else {}
        within, word = {
            "model": ("worker", "fedclient.resident.model_process"),
            "stub": ("superexec", "lean_clientapp"),
        }.get(child, (child, ""))
        found: int | None = children.get(within, {}).get("pid")
        return found if not word or found is None else _with_word(_descendants(found), word)


@dataclass
class Run:
    """A run of the scenario on the devices; ``folder``: its run folder."""

    folder: Path
    process: subprocess.Popen[str]
    told: str = ""

    def events(self) -> list[dict[str, Any]]:
        """What has happened so far; a line that is being written is left out."""
        try:
            text = (self.folder / "events.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def round(self) -> int:
        """The round whose questions are out; 0 before the first."""
        found = [
            e["round"] for e in self.events()
            if e["event"] == "phase_started" and e["phase"] == "train"
        ]  # fmt: skip
        return max(found, default=0)

    def accepted_after(self, name: str, moment: float) -> float | None:
        """When an answer of a node was accepted first after a moment (seconds since 1970)."""
        times = [
            float(e["time"]) for e in self.events()
            if e["event"] == "node_replied" and e["node"] == name and e["verdict"] == "accepted"
        ]  # fmt: skip
        return min((t for t in times if t > moment), default=None)

    @property
    def ended(self) -> bool:
        """Whether the command has returned."""
        return self.process.poll() is not None

    def wait(self) -> int:
        """Its exit code; what it said is in ``told``."""
        if not self.told:
            output, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
            self.told = output.strip()
        return self.process.wait()


@dataclass
class Laboratory:
    """The deployment. A context manager; needs a network namespace of its own."""

    folder: Path
    count: int
    devices: list[Device] = field(default_factory=list)

    def __enter__(self) -> Laboratory:
        subprocess.run(["ip", "addr", "add", f"{SERVER}/32", "dev", "lo"], check=True)
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.scenario = write_scenario(self.folder / "scenario", ROUNDS, self.count)
        self.server = self.folder / "server"
        self.disk = Disk(self.server, SERVER_DISK_BYTES)
        address = f"{SERVER}:{PORT}"
        try:
            self.fedbraid("server", "up", str(self.server), "--listen", address, "--name", SERVER)
            for index in range(self.count):
                self.devices.append(self._join(index))
            for device in self.devices:
                device.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for device in self.devices:
            for process in device.processes():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)
            stop(device.folder)
            device.link.close()
            device.host.close()
            device.disk.close()
        stop(self.server)
        self.disk.close()

    def _join(self, index: int) -> Device:
        name, folder = f"node-{index}", self.folder / f"node-{index}"
        host, clock = Host(), Clock(self.folder / f"clock-{index}")
        link = Link(f"chaos{index}", f"10.77.{index + 1}.1", f"10.77.{index + 1}.2", host.pid)
        disk = Disk(folder, DEVICE_DISK_BYTES)
        environment = {
            **self.environment, **clock.environment, "FEDBRAID_CACHE": str(folder / "cache"),
        }  # fmt: skip
        device = Device(name, folder, host, link, clock, disk, environment)
        words = self.fedbraid("server", "invite", str(self.server), name).split()
        device.fedbraid(*words[1:], "--folder", str(folder), "--partition", str(index))
        return device

    def fedbraid(self, *words: str) -> str:
        """The command on the server; returns what it printed."""
        return _run(_command(*words), self.environment)

    def configuration(self, overrides: Iterable[str] = ()) -> RunConfiguration:
        """The scenario."""
        return load(str(self.scenario), [*OVERRIDES, *overrides])

    def undisturbed(self, overrides: Iterable[str]) -> str:
        """The ledger head of the same run without a network, computed here."""
        folder = self.folder / "-".join(["undisturbed", *overrides])
        if not (folder / "summary.json").is_file():
            simulate(self.configuration(overrides), folder, lambda event: None, samples=0)
        return ledger_head(folder)

    def start_run(self, name: str, overrides: Iterable[str] = (), *, resume: bool = False) -> Run:
        """``fedbraid server run``."""
        output = self.server / "runs" / name
        words = ["server", "run", str(self.server), str(self.scenario), "--output", str(output)]
        for override in [*OVERRIDES, *overrides]:
            words += ["--set", override]
        words += ["--resume"] if resume else []
        process = subprocess.Popen(
            _command(*words), env=self.environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return Run(output, process)

    def logs(self, characters: int = 1500) -> str:
        """The end of every log, for whoever has to find out what went wrong."""
        texts = []
        for path in sorted([*self.folder.glob("*/logs/*.log"), *self.folder.glob("*.log")]):
            text = path.read_text(encoding="utf-8", errors="replace")
            texts.append(f"== {path.relative_to(self.folder)}\n{text[-characters:]}")
        return "\n".join(texts)


def faults_of(folder: Path, configuration: RunConfiguration) -> tuple[list[str], list[str]]:
    """What is wrong with a finished run's ledger, and which answers it names as not counted."""
    ledger = Ledger(folder)
    try:
        problems = ledger.verify()
        named, nodes = [], sorted(node.name for node in configuration.nodes)
        entries = list(ledger.entries("round"))
        for entry in entries:
            rows = [row for row in entry.content["nodes"] if row["round"] == entry.round]
            if sorted(row["node"] for row in rows) != nodes:
                problems.append(f"round {entry.round} has rows of {[row['node'] for row in rows]}")
            named += [
                f"{row['node']} {row['verdict']} in round {entry.round}"
                for row in rows
                if row["verdict"] != "accepted"
            ]
        if [entry.round for entry in entries] != list(range(1, configuration.rounds + 1)):
            problems.append(f"rounds {[entry.round for entry in entries]}")
        replayed = replay(ledger, configuration)
        problems += [f"round {one.round} replays differently" for one in replayed if not one.equal]
        return problems, named
    finally:
        ledger.close()


def wait_until(condition: Any, seconds: float = PATIENCE_SECONDS) -> None:
    """Look until it is so. Raises TimeoutError."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(LOOK_SECONDS)


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "simulations.command", *words]


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def _descendants(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _with_word(processes: Iterable[int], word: str) -> int | None:
    def named() -> Iterator[int]:
        for process in processes:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if word in " ".join(psutil.Process(process).cmdline()):
                    yield process

    return next(named(), None)
