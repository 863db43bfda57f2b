"""Real processes: what dies is started again, and nothing is left when the supervisor ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedhost import supervision
from fedhost.supervision import SupervisionError, clear_leftovers, status_of, stop

PATIENCE_SECONDS = 60.0
WAIT = "import signal; signal.pause()"
# A parent whose own child says where it is, and stays.
PARENT = (
    "import pathlib, subprocess, sys, signal;"
    " child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']);"
    " pathlib.Path(sys.argv[1]).write_text(str(child.pid)); signal.pause()"
)
DRIVER = """
import sys, json, os
from pathlib import Path
from fedhost import supervision
from fedhost.supervision import Child, SupervisionError, Supervisor
supervision.PROBE_SECONDS = 0.1
folder = Path(sys.argv[1])

def serves(one):
    if (folder / "trap").exists():
        raise ValueError("a trap")
    return not one.get("needs") or (folder / one["needs"]).exists()

children = [
    Child(one["name"], [sys.executable, "-c", *one["code"]], dict(os.environ),
          ready=lambda one=one: serves(one), **one.get("more", {}),
          finish={int(k): v for k, v in one.get("finish", {}).items()})
    for one in json.loads(sys.argv[2])
]
try:
    Supervisor(folder, children).run()
except SupervisionError as error:
    sys.exit(f"error: {error}")
"""

Start = Callable[[list[dict[str, Any]]], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def run(children: list[dict[str, Any]]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path), json.dumps(children)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    clear_leftovers(tmp_path)


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def ready(folder: Path, name: str = "one", restarts: int = 0) -> Callable[[], Any]:
    def look() -> Any:
        told = status_of(folder)
        child = told["children"][name] if told else {"state": "", "restarts": 0}
        return child if child["state"] == "ready" and child["restarts"] >= restarts else None

    return look


def test_a_killed_child_is_started_again_and_a_stop_ends_all(tmp_path: Path, start: Start) -> None:
    supervisor = start([{"name": "one", "code": [WAIT]}])
    first = until(ready(tmp_path))
    os.kill(first["pid"], signal.SIGKILL)
    second = until(ready(tmp_path, restarts=1))
    assert second["pid"] != first["pid"]
    assert second["last_exit"] == -signal.SIGKILL
    assert stop(tmp_path)
    supervisor.wait()
    assert not psutil.pid_exists(second["pid"])
    assert status_of(tmp_path) is None
    assert not stop(tmp_path)


def test_a_child_waits_for_those_before_it(tmp_path: Path, start: Start) -> None:
    start([{"name": "one", "code": [WAIT], "needs": "gate"}, {"name": "two", "code": [WAIT]}])
    until(lambda: (told := status_of(tmp_path)) and told["children"]["one"]["state"] == "starting")
    told = status_of(tmp_path)
    assert told is not None
    assert told["children"]["two"]["pid"] is None
    (tmp_path / "gate").touch()
    until(ready(tmp_path, "two"))


def test_descendants_end_with_a_killed_child(tmp_path: Path, start: Start) -> None:
    note = tmp_path / "descendant"
    start([{"name": "one", "code": [PARENT, str(note)]}])
    descendant = int(until(lambda: note.exists() and note.read_text()))
    os.kill(until(ready(tmp_path))["pid"], signal.SIGKILL)
    until(ready(tmp_path, restarts=1))
    until(lambda: not _alive(descendant))


def test_what_a_killed_supervisor_left_is_ended_by_the_next(tmp_path: Path, start: Start) -> None:
    killed = start([{"name": "one", "code": [WAIT]}])
    orphan = until(ready(tmp_path))["pid"]
    killed.kill()
    killed.wait()
    assert _alive(orphan)
    start([{"name": "one", "code": [WAIT]}])
    assert until(ready(tmp_path))["pid"] != orphan
    assert not _alive(orphan)


def test_a_clock_that_is_set_hides_no_process(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = start([{"name": "one", "code": [WAIT]}])
    child = until(ready(tmp_path))["pid"]
    # The time of day of a start is reckoned from the machine's, which moves with the clock.
    began = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: began(process) + 100.0)
    assert status_of(tmp_path) is not None
    assert stop(tmp_path)
    supervisor.wait()
    assert not _alive(child)


def test_what_cannot_be_ended_is_named_and_stays_on_record(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = start([{"name": "one", "code": [WAIT]}])
    orphan = until(ready(tmp_path))["pid"]
    killed.kill()
    killed.wait()
    with monkeypatch.context() as powerless:
        powerless.setattr(supervision, "STOP_SECONDS", 0.1)
        powerless.setattr(supervision, "_signal_group", lambda group, number: None)
        with pytest.raises(SupervisionError, match=str(orphan)):
            stop(tmp_path)
    assert _alive(orphan)
    assert stop(tmp_path)
    assert not _alive(orphan)


@pytest.mark.parametrize(
    "damaged",
    [b"", b'{"pid": 4', b"\xff\xfe", b"[1]", b'{"pid": 1}', b'{"pid": 1, "identity": "x"}'],
)
def test_a_damaged_status_file_is_that_of_no_supervisor(
    damaged: bytes, tmp_path: Path, start: Start
) -> None:
    (tmp_path / "status.json").write_bytes(damaged)
    assert status_of(tmp_path) is None
    assert not stop(tmp_path)
    clear_leftovers(tmp_path)


def test_a_child_that_cannot_be_started_is_tried_again_and_the_others_run_on(
    tmp_path: Path, start: Start
) -> None:
    log = tmp_path / "logs" / "one.log"
    log.mkdir(parents=True)  # no file is opened there
    driver = start([{"name": "before", "code": [WAIT]}, {"name": "one", "code": [WAIT]}])
    until(lambda: (told := status_of(tmp_path)) and told["children"]["one"]["restarts"] >= 1)
    before = until(ready(tmp_path, "before"))
    log.rmdir()
    until(ready(tmp_path, restarts=1))
    assert until(ready(tmp_path, "before"))["pid"] == before["pid"]
    driver.terminate()
    _, text = driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode == 0
    assert text.count("cannot be started") == 1


def test_two_supervisors_do_not_share_a_folder(tmp_path: Path, start: Start) -> None:
    start([{"name": "one", "code": [WAIT]}])
    until(ready(tmp_path))
    with pytest.raises(SupervisionError, match="already running"):
        clear_leftovers(tmp_path)


def test_an_exit_that_no_restart_mends_ends_the_supervision(tmp_path: Path, start: Start) -> None:
    children = [{"name": "one", "code": ["raise SystemExit(77)"], "finish": {77: "shut out"}}]
    supervisor = start([*children, {"name": "two", "code": [WAIT]}])
    _, text = supervisor.communicate(timeout=PATIENCE_SECONDS)
    assert supervisor.returncode == 1
    assert text.strip() == "error: shut out"


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_child_that_lives_and_no_longer_serves_is_started_again(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "word").touch()
    driver = start([{"name": "one", "code": [WAIT], "needs": "word"}])
    first = until(ready(tmp_path))
    (tmp_path / "word").unlink()
    until(lambda: not psutil.pid_exists(first["pid"]))
    (tmp_path / "word").touch()
    until(ready(tmp_path, restarts=1))
    driver.terminate()
    driver.wait()


def test_a_probe_that_raises_counts_as_silence_and_is_told_once(
    start: Start, tmp_path: Path
) -> None:
    driver = start([{"name": "one", "code": [WAIT]}])
    first = until(ready(tmp_path))
    (tmp_path / "trap").touch()
    until(lambda: not psutil.pid_exists(first["pid"]))
    until(lambda: (told := status_of(tmp_path)) and told["children"]["one"]["state"] == "starting")
    (tmp_path / "trap").unlink()
    until(ready(tmp_path, restarts=1))
    driver.terminate()
    _, text = driver.communicate(timeout=PATIENCE_SECONDS)
    assert text == "one cannot be asked whether it serves: ValueError('a trap')\n"
    assert driver.returncode == 0


def test_a_child_that_hangs_while_it_starts_is_started_again(start: Start, tmp_path: Path) -> None:
    def pid() -> Any:
        told = status_of(tmp_path)
        return told and told["children"]["one"]["pid"]

    hanging = {"name": "one", "code": [WAIT], "needs": "word", "more": {"start_seconds": 0.2}}
    start([hanging])
    first = until(pid)
    until(lambda: pid() not in (None, first))
    assert not psutil.pid_exists(first)
    (tmp_path / "word").touch()
    until(ready(tmp_path, restarts=1))


def test_what_serves_is_watched_while_one_before_it_starts(start: Start, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).touch()
    start([{"name": name, "code": [WAIT], "needs": name} for name in ("first", "second")])
    behind = until(ready(tmp_path, "second"))
    (tmp_path / "first").unlink()
    before = until(ready(tmp_path, "first"))
    os.kill(before["pid"], signal.SIGKILL)
    (tmp_path / "second").unlink()
    until(lambda: not psutil.pid_exists(behind["pid"]))
    for name in ("first", "second"):
        (tmp_path / name).touch()
    until(ready(tmp_path, "second", restarts=1))
