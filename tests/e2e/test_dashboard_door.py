"""The dashboard behind a real front door: an OpenID provider signs people in, a webhook hears alerts."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from fedhost.ports import LOOPBACK, free_ports
from fedhost.process_identity import process_identity
from fedhost.supervision import stop
from fedserver.deployment.folder import FolderError, ServerFolder, Settings

PATIENCE_SECONDS = 60.0
PROVIDER = Path(__file__).parents[1] / "fedserver" / "dashboard" / "openid_provider.py"


@pytest.fixture(scope="module")
def issuer() -> Iterator[Any]:
    specification = importlib.util.spec_from_file_location("openid_provider", PROVIDER)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    found = module.Issuer()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def receiver() -> Iterator[tuple[str, queue.Queue[dict[str, Any]]]]:
    heard: queue.Queue[dict[str, Any]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *values: Any) -> None:
            pass

    server = HTTPServer((LOOPBACK, 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://{LOOPBACK}:{server.server_port}/alerts", heard
    server.shutdown()
    thread.join()
    server.server_close()


def up(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simulations.command", "server", "up", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True)


def write_provider(folder: Path, issuer: Any, **more: str) -> Path:
    (folder / "client.secret").write_text("the client's secret\n")
    told = {"issuer": issuer.address, "client_id": "dashboard", "secret_file": "client.secret"}
    lines = [f'{key} = "{value}"' for key, value in (told | more).items()]
    file = folder / "oidc.toml"
    file.write_text("\n".join([*lines, 'operators = ["admins"]', ""]))
    return file


def a_run_without_a_quorum(folder: Path) -> None:
    """A run of this process, as far as its files say."""
    folder.mkdir(parents=True)
    live = {"name": "weak", "state": "running", "phase": "train", "round": 2, "committed": 1}
    live |= {"process": process_identity(os.getpid()), "host": socket.gethostname()}
    (folder / "live.json").write_text(json.dumps(live))
    row = {"round": 1, "quorum": False, "bytes_up": 0, "bytes_down": 0, "seconds": 1.0, "nodes": []}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def test_a_provider_and_a_webhook_serve_behind_the_front_door_and_after_a_restart(
    issuer: Any, receiver: tuple[str, queue.Queue[dict[str, Any]]], tmp_path: Path
) -> None:
    address, heard = receiver
    folder = tmp_path / "server"
    listen, shown = free_ports(2)
    a_run_without_a_quorum(folder / "runs" / "weak")
    there = ("--listen", f"{LOOPBACK}:{listen}", "--dashboard", f"{LOOPBACK}:{shown}")
    given = ("--oidc", str(write_provider(tmp_path, issuer)), "--alerts", address)
    door = f"https://{LOOPBACK}:{shown}"
    try:
        done = up(folder, *there, *given)
        assert done.returncode == 0, done.stderr
        assert door in done.stdout
        stop(folder)
        # What it was told once, it keeps.
        assert up(folder).returncode == 0
        with requests.Session() as browser:
            browser.trust_env = False
            browser.verify = str(ServerFolder(folder).loopback_identity.authority)
            assert browser.get(f"{door}/api/v1/runs", timeout=60).status_code == 401
            sent = browser.get(f"{door}/login/oidc", allow_redirects=False, timeout=60)
            assert sent.status_code == 303, sent.text
            agreed = requests.get(sent.headers["location"], allow_redirects=False, timeout=60)
            back = agreed.headers["location"]
            assert back.startswith(f"{door}/login/oidc/callback?")
            assert browser.get(back, timeout=60).status_code == 200
            assert issuer.problems == []
            assert browser.get(f"{door}/api/v1/runs", timeout=60).status_code == 200
            # Only operators see this.
            assert browser.get(f"{door}/api/v1/access", timeout=60).status_code == 200
        alert = heard.get(timeout=PATIENCE_SECONDS)
        assert (alert["kind"], alert["run"], alert["status"]) == ("quorum_missed", "weak", "firing")
    finally:
        stop(folder)


def test_what_cannot_work_is_said_in_one_line_before_anything_starts(
    issuer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "server"
    listen, shown = free_ports(2)
    there = ("--listen", f"{LOOPBACK}:{listen}", "--dashboard", f"{LOOPBACK}:{shown}")
    for words, told in (
        (("--oidc", str(write_provider(tmp_path, issuer))), "--dashboard"),
        ((*there, "--alerts", "a receiver"), "http"),
        ((*there, "--oidc", str(tmp_path / "nothing.toml")), "nothing.toml"),
        ((*there, "--oidc", ""), "fedbraid accounts add"),
    ):
        done = up(folder, *words)
        assert done.returncode == 2, done.stdout
        assert told in done.stderr
        assert done.stderr.startswith("error:")
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("dashboard", "names", "address"),
    [
        ("0.0.0.0:8444", ("fed.example.org", "10.0.0.7"), "https://fed.example.org:8444"),
        ("0.0.0.0:443", ("fed.example.org",), "https://fed.example.org"),
        ("[::]:8444", ("2001:db8::7",), "https://[2001:db8::7]:8444"),
        ("127.0.0.1:8444", (), "https://127.0.0.1:8444"),
    ],
)
def test_a_provider_sends_people_back_to_the_front_door_unless_it_is_told_where(
    dashboard: str, names: tuple[str, ...], address: str, issuer: Any, tmp_path: Path
) -> None:
    from fedserver.deployment.dashboard import provider_of

    file = write_provider(tmp_path, issuer)
    settings = Settings(dashboard=dashboard, names=names, oidc=str(file))
    provider = provider_of(settings)
    assert provider is not None
    assert provider.settings.address == settings.dashboard_address == address
    write_provider(tmp_path, issuer, address="https://elsewhere.example")
    provider = provider_of(settings)
    assert provider is not None
    assert provider.settings.address == "https://elsewhere.example"
    assert provider_of(Settings(dashboard=dashboard, names=names)) is None


def test_settings_of_the_dashboard_are_kept_and_taken_away(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path / "server")
    given = {"dashboard": "127.0.0.1:8444", "oidc": "/a.toml", "alerts": "https://x.example/hook"}
    folder.prepare(dict(given))
    kept = folder.prepare({})
    assert {key: getattr(kept, key) for key in given} == given
    assert folder.prepare({"oidc": "", "alerts": ""}) == folder.settings()
    assert (folder.settings().oidc, folder.settings().alerts) == ("", "")
    for alerts in ("x.example/hook", "ftp://x.example/", "http:///"):
        with pytest.raises(FolderError, match="alerts"):
            folder.prepare({"alerts": alerts})
