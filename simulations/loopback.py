"""A real deployment on this machine: SuperLink, SuperExecs, SuperNodes and resident workers, watched.

Every process is Flower's own or the device's own; only TLS, enrolment and distance are missing. What
dies is started again, and a run whose ServerApp is gone is submitted again with ``resume``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedclient.resident.flower import node_environment
from fedclient.resident.settings import ResidentSettings

REPOSITORY = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
STARTING_SECONDS = 120.0


@dataclass
class Service:
    """One process that is kept running."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def tend(self) -> None:
        """Start it if it does not run."""
        if self.process is not None and self.process.poll() is None:
            return
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                list(self.command), env=dict(self.environment), stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.starts += 1

    def end(self) -> None:
        """Kill it and all that it started."""
        if self.process is None:
            return
        for process in [*_descendants(self.process.pid), self.process.pid]:
            _kill(process)
        self.process.wait()


@dataclass
class Loopback:
    """A deployment of so many nodes under a folder. A context manager.

    ``resident``: whether nodes have resident workers and lean stubs; else Flower as it comes.
    """

    folder: Path
    nodes: int
    resident: bool = True
    stub_times: Path | None = None
    services: dict[str, Service] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = _free_port()
        self._home = node_environment(self.folder / "server")
        self._submission: subprocess.Popen[bytes] | None = None
        (self.folder / "server" / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "loop"\n\n[superlink.loop]\naddress = "{HOST}:{self.port}"\n'
            "insecure = true\n"
        )
        superlink = "-m fedserver.deployment.superlink" if self.resident else "flower-superlink"
        self._add(
            "superlink", self._home, superlink, "--insecure", "--host", HOST,
            "--port", str(self.port), "--isolation", "process",
            "--database", str(self.folder / "server" / "superlink.db"),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        self._add(
            "superexec", self._home, "flower-superexec", "--insecure",
            "--runtime-api-address", f"{HOST}:{self.port}",
        )  # fmt: skip
        for index in range(self.nodes):
            self._add_node(index)

    def _add_node(self, index: int) -> None:
        folder, port = self.folder / f"node-{index}", _free_port()
        environment = node_environment(folder)
        settings = f"partition-id={index}"
        if self.resident:
            worker = ResidentSettings(folder / "worker")
            worker.check()
            settings += f' worker="{worker.socket}"'
            # A cache of its own, as on a device: residuals are a node's.
            own = {**environment, "FEDBRAID_CACHE": str(folder / "cache")}
            self.services[f"worker-{index}"] = Service(
                f"worker-{index}", worker.command(), own, self.folder / f"worker-{index}.log"
            )
        else:
            # Flower's own stub and its own polls.
            path = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
            environment = {**environment, "PATH": os.pathsep.join(path)}
            del environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]
        if self.stub_times is not None:
            timed = _timed_stub(folder / "timed", environment["PATH"], self.stub_times)
            environment["PATH"] = f"{timed}{os.pathsep}{environment['PATH']}"
        supernode = "-m fedclient.resident.supernode" if self.resident else "flower-supernode"
        self._add(
            f"supernode-{index}", environment, supernode, "--insecure",
            "--superlink", f"{HOST}:{self.port}", "--host", HOST, "--port", str(port),
            "--isolation", "process", "--node-config", settings,
        )  # fmt: skip
        self._add(
            f"nodeexec-{index}", environment, "flower-superexec", "--insecure",
            "--runtime-api-address", f"{HOST}:{port}",
        )  # fmt: skip

    def _add(self, name: str, environment: Mapping[str, str], program: str, *rest: str) -> None:
        module = program.removeprefix("-m ")
        own = [sys.executable, "-m", module] if module != program else [_program(program)]
        command = [*own, *rest]
        self.services[name] = Service(name, command, environment, self.folder / f"{name}.log")

    def __enter__(self) -> Loopback:
        self.tend()
        until = time.monotonic() + STARTING_SECONDS
        while not _listens(self.port):
            if time.monotonic() > until:
                raise TimeoutError(self.logs())
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        if self._submission is not None and self._submission.poll() is None:
            self._submission.kill()
            self._submission.wait()
        for service in self.services.values():
            service.end()

    def tend(self) -> None:
        """Start again what has died."""
        for service in self.services.values():
            service.tend()

    def submit(self, application: Path, settings: str) -> None:
        """``flwr run`` without waiting for its end."""
        command = [_program("flwr"), "run", str(application), "loop"]
        command += ["--run-config", settings]
        with (self.folder / "flwr-run.log").open("ab") as output:
            self._submission = subprocess.Popen(
                command, env=self._home, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def submitting(self) -> bool:
        """Whether ``flwr run`` has not returned yet."""
        return self._submission is not None and self._submission.poll() is None

    def processes(self, kind: str) -> list[int]:
        """Process ids of one kind: a service's name without its number, or "stub", "serverapp",
        "model".
        """
        if kind == "stub":
            return self._below("nodeexec", "flwr-clientapp", "lean_clientapp.py")
        if kind == "serverapp":
            return self._below("superexec", "flwr-serverapp")
        if kind == "model":
            return self._below("worker", "fedclient.resident.model_process")
        return [
            service.process.pid
            for name, service in self.services.items()
            if name.split("-")[0] == kind and service.process is not None
        ]

    def _below(self, kind: str, *words: str) -> list[int]:
        found = []
        for parent in self.processes(kind):
            for process in _descendants(parent):
                try:
                    line = " ".join(psutil.Process(process).cmdline())
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
                if any(word in line for word in words):
                    found.append(process)
        return found

    def logs(self, characters: int = 4000) -> str:
        """The end of every log, for whoever has to find out what went wrong."""
        texts = []
        for path in sorted(self.folder.glob("*.log")):
            text = path.read_text(encoding="utf-8", errors="replace")
            texts.append(f"== {path.name}\n{text[-characters:]}")
        return "\n".join(texts)


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _timed_stub(folder: Path, path: str, times: Path) -> Path:
    """A ``flwr-clientapp`` that appends the CPU time of the real one to a file."""
    import shutil

    folder.mkdir(parents=True, exist_ok=True)
    real = shutil.which("flwr-clientapp", path=path)
    program = folder / "flwr-clientapp"
    program.write_text(f'#!/bin/sh\n"{real}" "$@"\nstatus=$?\ntimes >> "{times}"\nexit $status\n')
    program.chmod(0o755)
    return folder


def _descendants(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
