"""Runs of a deployed server, seen from outside of their process.

A run is a process of the server's. Its log says what it does, Flower whether it goes on; whoever started
it may leave.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedhost.process_identity import is_alive, number_of
from fedhost.supervision import status_of
from fedserver import events
from fedserver.configuration import RunConfiguration, load
from fedserver.control import APPLIED, ControlQueue
from fedserver.deployment.flower_control import (
    DeploymentError,
    FlowerControl,
    LiveRun,
    RunStatus,
    Unreachable,
)
from fedserver.deployment.folder import ServerFolder
from fedserver.deployment.registry import Registry
from fedserver.live_log import EVENTS, LIVE, is_running

POLL_SECONDS = 1.0
# Flower is asked this often which nodes are there; a terminal is told this often whom a run waits for.
NODES_SECONDS, REMIND_SECONDS = 2.0, 10.0
# A run has so long to end by itself when it is asked to; one that computes does not look.
STOP_SECONDS = 30.0
LITTLE_ROOM_BYTES = 8 << 20


class LogTail:
    """The events that a run appends to its log."""

    def __init__(self, folder: Path, offset: int | None = None) -> None:
        """``offset``: the byte to begin at, by default the log's end as it is now."""
        self._path = folder / EVENTS
        self._time: float | None = None
        with contextlib.suppress(FileNotFoundError):
            offset = self._path.stat().st_size if offset is None else offset
        self._offset = offset or 0

    def now(self) -> float:
        """The time of the event that was read last, while it is looked at; else the machine's (s)."""
        return time.time() if self._time is None else self._time

    def read(self) -> Iterator[events.Event]:
        """The events since the last look; half a line stays for the next."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                told = json.loads(line)
                event = events.from_json(told)
                self._time = float(told["time"])
            except (ValueError, TypeError, KeyError):
                continue
            if event is not None:
                yield event
        self._time = None


class Awaited:
    """Whom a run that has not begun waits for, in words."""

    def __init__(
        self, configuration: RunConfiguration, registry: Path, control: FlowerControl
    ) -> None:
        behind = {node for edge in configuration.edges for node in edge.nodes}
        self._names = [edge.name for edge in configuration.edges]
        self._names += [n.name for n in configuration.nodes if n.name not in behind]
        self._registry = registry
        self._control = control
        self._told = ""
        self._next_look = self._next_reminder = 0.0

    def news(self, now: float, *, remind: bool) -> str | None:
        """What to say now: what has changed, and with ``remind`` now and then the same again."""
        if now < self._next_look:
            return None
        self._next_look = now + NODES_SECONDS
        text = self._text()
        if text == self._told and not (remind and now >= self._next_reminder):
            return None
        self._told, self._next_reminder = text, now + REMIND_SECONDS
        return text

    def _text(self) -> str:
        registry = Registry(self._registry)
        try:
            nodes, invited = registry.nodes(), registry.open_invitations(time.time())
        finally:
            registry.close()
        joined = {node.name for node in nodes if node.revoked is None}
        revoked = {node.name for node in nodes} - joined
        # Flower takes a while to miss a node that was shut out.
        online = self._control.online() - revoked
        awaited = [name for name in self._names if name not in revoked]
        missing = []
        for name in awaited:
            if name not in online:
                how = "invited, has not joined" if name in invited else "not invited yet"
                missing.append(f"{name} ({'not connected' if name in joined else how})")
        strangers = sorted(online - set(self._names))
        there = len(online & set(awaited))
        text = f"{there} of {len(awaited)} nodes are connected"
        if missing:
            text = f"waits for {', '.join(missing)}; {text}"
        elif there and not strangers:
            text += "; they load their model"
        for name in self._names:
            if name in revoked:
                text += f"; {name} is revoked"
        if strangers:
            text += f"; not in the scenario: {', '.join(strangers)}"
        return text


def start(
    folder: ServerFolder,
    control: FlowerControl,
    live: LiveRun,
    bundle: bytes,
    *,
    join: bool = False,
) -> LiveRun:
    """Start a run, with Flower's id then; of commands that start it at once, one does.

    ``join``: another that was started in its folder is taken instead; else it raises DeploymentError.
    """
    # The folder itself is locked: a full disk has no room for a file.
    lock = os.open(folder.path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if join and (other := _under_way(control, live.folder)):
            return other
        refuse_another(folder, control, live.folder)
        return replace(live, run_id=control.start_run(bundle, live.settings))
    finally:
        os.close(lock)


def refuse_another(folder: ServerFolder, control: FlowerControl, target: Path) -> None:
    """Raise DeploymentError if a run is under way in this run folder."""
    if other := _under_way(control, target):
        raise DeploymentError(
            f"{target} is the folder of a run that is under way: 'fedbraid server follow"
            f" {short(folder.path)} {other.name}' shows it, 'server stop' ends it"
        )


def _under_way(control: FlowerControl, target: Path) -> LiveRun | None:
    return next((one for one in control.live_runs() if one.folder == target), None)


def follow(
    folder: ServerFolder,
    control: FlowerControl,
    run_id: int,
    tail: LogTail,
    awaited: Awaited,
    view: events.Listener,
    *,
    remind: bool,
) -> RunStatus:
    """Show a run until it has ended; how it did. Raises Unreachable if the server is down."""
    begun = False
    while True:
        status = None
        try:
            status = control.run_status(run_id)
            if not begun and not status.finished:
                news = awaited.news(time.monotonic(), remind=remind)
                if news is not None:
                    view(events.Notice("info", news))
        except Unreachable:
            # A SuperLink that died is started again, and the run goes on meanwhile.
            if status_of(folder.path) is None:
                raise
        # The status was asked before: what a run that has ended wrote is all there.
        for event in tail.read():
            begun = begun or isinstance(event, events.RunStarted)
            view(event)
        if status is not None and status.finished:
            return status
        time.sleep(POLL_SECONDS)


def stop(folder: ServerFolder, control: FlowerControl, live: LiveRun) -> None:
    """End a run and its process, at once; nothing is committed afterwards.

    It is asked to first, so that it ends in order; one that does not look, or that still waits for its
    nodes, is ended by Flower.
    """
    queue, request = ControlQueue(live.folder), None
    if (live.folder / "ledger.db").is_file():
        request = queue.ask(
            "stop", {"now": True}, who=getpass.getuser(), role="operator", reason="server stop"
        )
        until = time.monotonic() + STOP_SECONDS
        while is_running(told(live.folder)) and time.monotonic() < until:
            if control.run_status(live.run_id).finished:
                break
            time.sleep(POLL_SECONDS / 2)
    if not control.run_status(live.run_id).finished:
        control.stop_run(live.run_id)
    _end_process(live.folder)
    if request is not None and any(one.id == request.id for one in queue.pending()):
        # It must not stop the run that is resumed.
        queue.settle(request, APPLIED, "its process was ended")


def _end_process(folder: Path) -> None:
    """See to it that the process that writes a run's folder has gone."""
    identity = str(told(folder).get("process") or "")
    until = time.monotonic() + STOP_SECONDS / 3
    while is_alive(identity):
        if time.monotonic() >= until:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number_of(identity), signal.SIGKILL)
        time.sleep(POLL_SECONDS / 4)


def told(folder: Path) -> dict[str, Any]:
    """What a run says of itself (``live.json``); nothing before it has begun."""
    try:
        found: dict[str, Any] = json.loads((folder / LIVE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def how_far(folder: Path) -> str:
    """ "after round 2 of 5", or before there is one."""
    live = told(folder)
    if not live.get("committed"):
        return "before its first round was committed"
    return f"after round {live['committed']} of {live['rounds']}"


def resumption(folder: ServerFolder, live: LiveRun) -> str:
    """The command that goes on with a run, or begins it where nothing was committed yet."""
    words = ["fedbraid", "server", "run", short(folder.path), short(Path(live.scenario))]
    for override in live.overrides:
        words += ["--set", override]
    if live.folder != folder.runs / load(live.scenario, live.overrides).name:
        words += ["--output", short(live.folder)]
    if (live.folder / "ledger.db").is_file():
        words.append("--resume")
    return f"'{shlex.join(words)}'"


def short(path: Path) -> str:
    """A path as it is written from here."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def lost(folder: ServerFolder, live: LiveRun, error: DeploymentError) -> DeploymentError:
    """What to say when Flower no longer answers: the server is down, or its disk is full."""
    go_on = resumption(folder, live)
    if has_no_room(folder.path):
        return DeploymentError(f"the disk of {folder.path} is full: make room, then {go_on}")
    if isinstance(error, Unreachable) and status_of(folder.path) is None:
        return DeploymentError(
            f"the server went down {how_far(live.folder)}: 'fedbraid server up"
            f" {short(folder.path)}', then {go_on}"
        )
    return DeploymentError(f"{error}; {go_on} goes on")


def has_no_room(folder: Path) -> bool:
    """Whether the folder's disk is as good as full."""
    return shutil.disk_usage(folder).free < LITTLE_ROOM_BYTES
