"""Child processes that are kept running: started in order, watched, restarted with a growing pause.

One that has died is started again, and so is one that lives and answers nothing, or never begins to.

A supervisor writes what it knows to one status file, so that other commands can ask and stop it, and so
that the next supervisor finds what a killed one has left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedhost.private_files import make_private_folder, write_private
from fedhost.process_identity import is_alive, number_of, process_identity

STATUS = "status.json"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
# A child that lived this long was well: its next failure starts with the shortest pause again.
WELL_SECONDS = 60.0
STOP_SECONDS, LOOK_SECONDS = 10.0, 0.05
# A child that serves is asked so often whether it still does; one that is silent so many times hangs.
PROBE_SECONDS, SILENT_PROBES = 3.0, 4
# One that does not serve so long after its start hangs as well.
START_SECONDS = 120.0
LOG_BYTES = 16 << 20


class SupervisionError(Exception):
    """Why processes are not started or stopped, and what to do."""


@dataclass(frozen=True)
class Child:
    """One process. ``ready`` says, within seconds, whether it serves; later children wait for it, and
    one that served and does so no longer is ended and started again. If it raises, that is no.
    ``start_seconds``: one that does not serve by then is ended and started again.

    What the process itself started ends with it: nginx's workers would hold the port.
    ``finish``: exit codes that end the whole supervision instead of a restart, and what they mean.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: Callable[[], bool] = lambda: True
    start_seconds: float = START_SECONDS
    finish: Mapping[int, str] = field(default_factory=dict)


@dataclass
class _Running:
    child: Child
    process: subprocess.Popen[bytes] | None = None
    state: str = "waiting"
    started: float = 0.0
    pause: float = FIRST_PAUSE
    resume_at: float = 0.0
    probe_at: float = 0.0
    silent: int = 0
    complaint: str = ""
    restarts: int = 0
    last_exit: int | None = None
    groups: list[str] = field(default_factory=list)


class Supervisor:
    """Runs children until it is told to stop; ``folder`` gets the status file and ``logs``."""

    def __init__(self, folder: Path, children: Sequence[Child]) -> None:
        self._folder = folder
        self._logs = make_private_folder(folder / "logs")
        self._identity = process_identity(os.getpid())
        self._running = [_Running(child) for child in children]
        self._wake = threading.Event()
        self._stopping = False
        self._written = ""
        self._failure: str | None = None

    def run(self) -> None:
        """Start and watch the children until SIGTERM or SIGINT.

        Raises SupervisionError when a child ended in a way that a restart does not mend.
        """
        clear_leftovers(self._folder)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        signal.signal(signal.SIGCHLD, lambda *_: self._wake.set())
        try:
            while not self._stopping:
                self._step(time.monotonic())
                # A full disk must not end what runs: others learn its state when there is room again.
                with contextlib.suppress(OSError):
                    self._write()
                settled = all(one.state == "ready" for one in self._running)
                self._wake.wait(2.0 if settled else 0.1)
                self._wake.clear()
        finally:
            self._end_all()
        if self._failure is not None:
            raise SupervisionError(self._failure)

    def _stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def _step(self, now: float) -> None:
        held = False
        for one in self._running:
            if one.process is not None and (code := one.process.poll()) is not None:
                self._died(one, code, now)
            if self._stopping:
                return
            if one.process is None and not held and now >= one.resume_at:
                self._start(one, now)
            if one.state == "starting":
                self._await(one, now)
            if one.state == "ready" and now >= one.probe_at:
                self._probe(one, now)
            if now - one.started > WELL_SECONDS:
                one.pause = FIRST_PAUSE
            # Those behind it need it to be started; what serves is watched all the same.
            held = held or one.state != "ready"

    def _await(self, one: _Running, now: float) -> None:
        """See whether a child serves by now, and end it if it has had its time."""
        assert one.process is not None
        if _serves(one):
            one.state, one.silent = "ready", 0
            one.probe_at = now + PROBE_SECONDS
        elif now - one.started > one.child.start_seconds:
            _signal_group(one.process.pid, signal.SIGKILL)

    def _probe(self, one: _Running, now: float) -> None:
        """End a child that has stayed silent for too long; it is then started again."""
        assert one.process is not None
        one.silent = 0 if _serves(one) else one.silent + 1
        one.probe_at = now + PROBE_SECONDS
        if one.silent == SILENT_PROBES:
            _signal_group(one.process.pid, signal.SIGKILL)

    def _start(self, one: _Running, now: float) -> None:
        """Start a child. Where the machine lets it not, for want of room or of files, it has died."""
        one.started = now
        try:
            self._launch(one)
        except OSError as error:
            _complain(one, f"{one.child.name} cannot be started: {error}")
            if one.process is not None:
                one.process.kill()
            else:
                self._pause(one, now)

    def _launch(self, one: _Running) -> None:
        log = self._logs / f"{one.child.name}.log"
        if log.exists() and log.stat().st_size > LOG_BYTES:
            os.replace(log, log.with_suffix(".log.1"))
        with log.open("ab") as output:
            one.process = subprocess.Popen(
                list(one.child.command),
                env=dict(one.child.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self._folder,
            )
        one.state = "starting"
        one.groups.append(process_identity(one.process.pid, unreaped=True))

    def _died(self, one: _Running, code: int, now: float) -> None:
        assert one.process is not None
        _signal_group(one.process.pid, signal.SIGKILL)
        one.groups.clear()
        one.process, one.last_exit = None, code
        if code in one.child.finish:
            self._failure = one.child.finish[code]
            self._stopping = True
            return
        self._pause(one, now)

    def _pause(self, one: _Running, now: float) -> None:
        one.state, one.restarts = "restarting", one.restarts + 1
        one.resume_at = now + one.pause
        one.pause = min(2 * one.pause, LONGEST_PAUSE)

    def _write(self) -> None:
        status = {
            "pid": os.getpid(),
            "identity": self._identity,
            "children": {
                one.child.name: {
                    "pid": one.process.pid if one.process else None,
                    "state": one.state,
                    "restarts": one.restarts,
                    "last_exit": one.last_exit,
                    "groups": one.groups,
                }
                for one in self._running
            },
        }
        text = json.dumps(status)
        if text != self._written:
            write_private(self._folder / STATUS, text)
            self._written = text

    def _end_all(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        left: list[int] = []
        for one in reversed(self._running):
            if one.process is not None:
                one.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.process.wait(STOP_SECONDS)
            left += [pid for group in one.groups for pid in _end_group(group)]
            if one.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.process.wait(STOP_SECONDS / 2)
        if left:
            # Whoever comes next must know of them.
            self._failure = self._failure or _not_ended(self._folder, left)
        else:
            (self._folder / STATUS).unlink(missing_ok=True)


def _serves(one: _Running) -> bool:
    """What its probe says. One that raises must not end the others: it counts as silent, and is told."""
    try:
        return one.child.ready()
    except Exception as error:
        _complain(one, f"{one.child.name} cannot be asked whether it serves: {error!r}")
        return False


def _complain(one: _Running, complaint: str) -> None:
    """Tell something of a child, once in a row."""
    if complaint != one.complaint:
        one.complaint = complaint
        with contextlib.suppress(OSError):
            print(complaint, file=sys.stderr, flush=True)


def status_of(folder: Path) -> dict[str, Any] | None:
    """What the supervisor of this folder says; None when none is running."""
    told = _read(folder)
    return told if told is not None and is_alive(told["identity"]) else None


def stop(folder: Path) -> bool:
    """End the supervisor of this folder and all its children; False when nothing was running.

    Raises SupervisionError with the processes that could not be ended.
    """
    told = _read(folder)
    if told is None:
        return False
    patience = STOP_SECONDS * (len(told["children"]) + 1)
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, STOP_SECONDS)):
        if is_alive(told["identity"]):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(told["pid"], number)
            _await_end([told["identity"]], seconds)
    if is_alive(told["identity"]):
        raise SupervisionError(_not_ended(folder, [told["pid"]]))
    clear_leftovers(folder)
    return True


def clear_leftovers(folder: Path) -> None:
    """End what a supervisor that was killed has left running.

    Raises SupervisionError if one is still at work, or something could not be ended.
    """
    told = _read(folder)
    if told is None:
        return
    if is_alive(told["identity"]) and told["pid"] != os.getpid():
        raise SupervisionError(f"{folder} is already running (process {told['pid']})")
    groups = [group for child in told["children"].values() for group in child["groups"]]
    if left := [pid for group in groups for pid in _end_group(group)]:
        raise SupervisionError(_not_ended(folder, left))
    (folder / STATUS).unlink(missing_ok=True)


def start_detached(command: Sequence[str], folder: Path, settled: Callable[[], bool]) -> None:
    """Start a supervisor's command in the background; returns once its children are ready.

    ``settled`` is asked between looks. Raises SupervisionError with the log's last line if it ends.
    """
    log = make_private_folder(folder / "logs") / "supervisor.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    while True:
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            pass
        else:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no reason given"]
            raise SupervisionError(lines[-1].removeprefix("error: "))
        told = status_of(folder)
        if told is None or told["pid"] != process.pid:
            continue
        for name, child in told["children"].items():
            if child["restarts"] >= 3:
                process.terminate()
                process.wait()
                raise SupervisionError(f"{name} does not start: see {folder / 'logs' / name}.log")
        if settled() and all(one["state"] == "ready" for one in told["children"].values()):
            return


def _read(folder: Path) -> dict[str, Any] | None:
    """The status file; None where there is none, or one that a broken disk left unreadable.

    Raises SupervisionError for one that may not be read.
    """
    try:
        found: dict[str, Any] = json.loads((folder / STATUS).read_text())
        groups = [group for child in found["children"].values() for group in child["groups"]]
        numbers = [number_of(identity) for identity in (found["identity"], *groups)]
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ):
        return None
    except OSError as error:
        raise SupervisionError(f"{folder / STATUS} cannot be read: {error.strerror}") from None
    return found if found.get("pid") == numbers[0] else None


def _not_ended(folder: Path, left: Sequence[int]) -> str:
    numbers = ", ".join(map(str, left))
    return f"{folder}: these processes cannot be ended: {numbers}; see to them, then stop it again"


def _end_group(identity: str) -> list[int]:
    """End a process group, politely and then for good; returns the numbers of those that still live.

    Without its leader the group is ended only if no later process took the leader's number.
    """
    group = number_of(identity)
    if process_identity(group) not in ("", identity):
        return []
    left: list[str] = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal_group(group, number)
        members = [process_identity(pid) for pid in psutil.pids() if _group_of(pid) == group]
        left = _await_end(filter(None, members), STOP_SECONDS / 2)
    return [number_of(one) for one in left]


def _await_end(identities: Iterable[str], seconds: float) -> list[str]:
    """Wait until these processes have gone; returns those that have not."""
    left, until = list(identities), time.monotonic() + seconds
    while (left := [one for one in left if is_alive(one)]) and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
    return left


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
