"""Alerts are sent once, to a real receiver, and taken back when they are over."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedserver.dashboard.alerts import Watchdog
from fedserver.dashboard.library import Library
from fedserver.live_log import process_identity


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


def test_what_is_wrong_is_said_once_and_taken_back(
    runs: Path, receiver: tuple[str, list[dict[str, Any]]]
) -> None:
    address, got = receiver
    folder = runs / "mixed"
    told = json.loads((folder / "live.json").read_text()) | {"state": "running"}
    told |= {"process": process_identity(os.getpid()), "host": socket.gethostname()}
    (folder / "live.json").write_text(json.dumps(told))
    healthy = (folder / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in healthy.splitlines()]
    rows[-1]["eval_loss"] = 100.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    (folder / "metrics.jsonl").write_text(healthy)
    watchdog.look()
    resolved = [one["kind"] for one in got if one["status"] == "resolved"]
    assert resolved == ["loss"]
