"""Alerts are sent once, to a real receiver, and taken back when they are over."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedhost.process_identity import process_identity
from fedserver.dashboard.alerts import Watchdog
from fedserver.dashboard.library import Library


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *values: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", got
    server.shutdown()
    thread.join()
    server.server_close()


def as_if_running(folder: Path) -> None:
    told = json.loads((folder / "live.json").read_text()) | {"state": "running"}
    told |= {"process": process_identity(os.getpid()), "host": socket.gethostname()}
    (folder / "live.json").write_text(json.dumps(told))


def commit(folder: Path, **values: Any) -> None:
    """One more row of metrics, as the last one but for what is given."""
    path = folder / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    with path.open("a") as file:
        file.write(json.dumps(last | {"round": last["round"] + 1} | values) + "\n")


def kinds(got: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(one["kind"], one["status"]) for one in got]


def test_what_is_wrong_is_said_once_and_taken_back(
    runs: Path, receiver: tuple[str, list[dict[str, Any]]]
) -> None:
    address, got = receiver
    folder = runs / "mixed"
    as_if_running(folder)
    commit(folder, eval_loss=100.0)
    unreachable = Watchdog(Library(runs), "http://127.0.0.1:9/")
    assert unreachable.look() == unreachable.look()
    watchdog = Watchdog(Library(runs), address)
    first = {alert.kind for alert in watchdog.look()}
    assert {"loss", "node_silent"} <= first
    assert {one["kind"] for one in got} == first
    # Late is not silent: "cafe" has answered, "office" never.
    assert [one["text"].split()[0] for one in got if one["kind"] == "node_silent"] == ["office"]
    watchdog.look()
    assert len(got) == len(first)
    # Started again, the dashboard does not repeat itself.
    watchdog = Watchdog(Library(runs), address)
    watchdog.look()
    assert len(got) == len(first)
    commit(folder, eval_loss=1.0)
    Watchdog(Library(runs), address).look()
    assert [one["kind"] for one in got if one["status"] == "resolved"] == ["loss"]


@pytest.mark.parametrize("state", ["running", "finished"])
def test_rounds_without_a_quorum_between_two_looks_are_told_once(
    runs: Path, receiver: tuple[str, list[dict[str, Any]]], state: str
) -> None:
    address, got = receiver
    folder = runs / "mixed"
    as_if_running(folder)
    Watchdog(Library(runs), address).look()
    got.clear()
    commit(folder, quorum=False)
    commit(folder, quorum=False)
    commit(folder, quorum=True, eval_loss=90.0)
    commit(folder, quorum=True)
    if state == "finished":
        live = json.loads((folder / "live.json").read_text())
        (folder / "live.json").write_text(json.dumps(live | {"state": "finished"}))
    shutil.copytree(folder, runs / "meanwhile")
    # Who cannot be reached hears of it later, and nothing is said twice.
    Watchdog(Library(runs), "http://127.0.0.1:9/").look()
    watchdog = Watchdog(Library(runs), address)
    for _ in range(3):
        watchdog.look()
    for run in ("mixed", "meanwhile"):
        mine = [one for one in got if one["run"] == run and one["kind"] != "node_silent"]
        assert kinds(mine) == [
            ("quorum_missed", "firing"),
            ("quorum_missed", "resolved"),
            ("loss", "firing"),
        ]
        assert mine[0]["text"].startswith("round 4 ")
        assert "round 6" in mine[1]["text"]
        assert "rounds 4 to 5" in mine[1]["text"]


def test_rounds_before_the_first_look_are_history_where_the_run_has_ended(
    runs: Path, receiver: tuple[str, list[dict[str, Any]]]
) -> None:
    address, got = receiver
    commit(runs / "mixed", quorum=False)
    Watchdog(Library(runs), address).look()
    assert got == []


def test_what_is_over_is_said_as_it_is(
    runs: Path, receiver: tuple[str, list[dict[str, Any]]]
) -> None:
    """A node that never answered has not come back because the run has ended."""
    address, got = receiver
    folder = runs / "mixed"
    as_if_running(folder)
    watchdog = Watchdog(Library(runs), address)
    commit(folder, eval_loss=100.0)
    watchdog.look()
    commit(folder, eval_loss=1.0)
    live = json.loads((folder / "live.json").read_text())
    (folder / "live.json").write_text(json.dumps(live | {"state": "finished"}))
    for _ in range(2):
        Watchdog(Library(runs), address).look()
    texts = {(one["kind"], one["status"]): one["text"] for one in got}
    assert "the run has ended" in texts["node_silent", "resolved"]
    for kind in ("node_silent", "loss"):
        assert texts[kind, "firing"] != texts[kind, "resolved"]
    assert len(got) == len(texts)


def test_a_small_loss_is_not_alarming_for_its_noise(
    runs: Path, receiver: tuple[str, list[dict[str, Any]]]
) -> None:
    address, got = receiver
    folder = runs / "mixed"
    as_if_running(folder)
    Watchdog(Library(runs), address).look()
    for loss in (0.004, 0.008):
        commit(folder, eval_loss=loss)
    Watchdog(Library(runs), address).look()
    assert [one for one in got if one["kind"] == "loss"] == []
    commit(folder, eval_loss=0.2)
    Watchdog(Library(runs), address).look()
    assert kinds([one for one in got if one["kind"] == "loss"]) == [("loss", "firing")]


def test_a_ledger_that_is_changed_after_its_run_is_told(
    runs: Path, receiver: tuple[str, list[dict[str, Any]]]
) -> None:
    address, got = receiver
    Watchdog(Library(runs), address).look()
    assert got == []

    def link(height: int, digest: str) -> str:
        database = sqlite3.connect(runs / "mixed" / "ledger.db")
        before = database.execute("SELECT previous FROM entries WHERE height = ?", (height,))
        found = str(before.fetchone()[0])
        database.execute("UPDATE entries SET previous = ? WHERE height = ?", (digest, height))
        database.commit()
        database.close()
        return found

    before = link(2, "0" * 64)
    # Nobody hears of it at first; then it is said once.
    Watchdog(Library(runs), "http://127.0.0.1:9/").look()
    for _ in range(2):
        Watchdog(Library(runs), address).look()
    assert kinds(got) == [("chain_broken", "firing")]
    link(2, before)
    Watchdog(Library(runs), address).look()
    assert kinds(got)[1:] == [("chain_broken", "resolved")]
    assert got[0]["text"] != got[1]["text"]


def test_a_disk_that_is_full_costs_one_line_and_no_alert(
    runs: Path,
    receiver: tuple[str, list[dict[str, Any]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    address, got = receiver
    folder = runs / "mixed"
    as_if_running(folder)
    watchdog = Watchdog(Library(runs), address)
    watchdog.look()
    got.clear()
    # A folder stands where the file would be written, as little to be replaced as on a full disk.
    (runs / ".dashboard" / "alerts.json").unlink()
    (runs / ".dashboard" / "alerts.json" / "full").mkdir(parents=True)
    commit(folder, quorum=False)
    for _ in range(3):
        watchdog.look()
    assert kinds(got) == [("quorum_missed", "firing")]
    assert len([line for line in caplog.messages if "written down" in line]) == 1
