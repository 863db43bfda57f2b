"""A real server behind a real nginx: who may join, who may speak, and what an attacker meets."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import socketserver
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.client import HTTPSConnection
from pathlib import Path

import pytest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from fedclient.deployment.joining import address_of, inquire, join, leave
from fedclient.deployment.settings import NodeFolder, NodeFolderError
from fedhost.enrolment import EnrolmentRefused, RefusalKind, Token
from fedhost.node_signature import signed_headers
from fedhost.ports import LOOPBACK
from fedhost.supervision import status_of
from fedserver.deployment.application import bundle, bundle_hash
from fedserver.deployment.certificates import make_authority, make_server_certificate
from fedserver.deployment.flower_control import FlowerControl
from fedserver.deployment.registry import Registry
from simulations.benchmarks.edge.large_body import send_large_bodies
from simulations.benchmarks.edge.replays import replay_request, replay_token
from simulations.benchmarks.edge.routes import open_routes
from simulations.benchmarks.edge.server import PASSWORD, PULL, Device, Door, Server, running_server
from simulations.benchmarks.edge.slow_sockets import GIVE_UP_SECONDS, hold_sockets

MEGABYTE = 1 << 20
PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def device(server: Server, tmp_path: Path) -> Iterator[Device]:
    made = server.enrol(tmp_path.name, tmp_path / "device")
    yield made
    fedbraid("server", "revoke", str(server.folder.path), tmp_path.name)


def fedbraid(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simulations.command", *words]
    return subprocess.run(command, capture_output=True, text=True)


def refused(kind: RefusalKind, server: Server, token: Token | str, folder: Path) -> str:
    with pytest.raises(EnrolmentRefused) as refusal:
        join(server.url, str(token), NodeFolder(folder), {})
    assert refusal.value.kind == kind
    assert not NodeFolder(folder).file.exists()
    return str(refusal.value)


@contextmanager
def in_between(server: Server, folder: Path) -> Iterator[tuple[str, list[bytes]]]:
    """A man in the middle with an authority of his own; his address, and what he was told."""
    own = make_server_certificate(folder / "own", make_authority(folder / "authority"), [])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.certificate, own.key)
    overheard: list[bytes] = []

    class Middle(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError), context.wrap_socket(self.request, server_side=True) as victim:
                asked = victim.recv(1 << 16)
                overheard.append(asked)
                address = (LOOPBACK, server.settings.port)
                passed_on = asked.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
                with (
                    socket.create_connection(address) as plain,
                    server.tls().wrap_socket(plain, server_hostname=LOOPBACK) as genuine,
                ):
                    genuine.sendall(passed_on)
                    while answer := genuine.recv(1 << 16):
                        victim.sendall(answer)

    with socketserver.ThreadingTCPServer((LOOPBACK, 0), Middle) as middle:
        thread = threading.Thread(target=middle.serve_forever)
        thread.start()
        yield f"https://{LOOPBACK}:{middle.server_address[1]}", overheard
        middle.shutdown()
        thread.join()


def pull(server: Server, device: Device) -> int:
    door = Door(server)
    status, _ = door.ask("POST", PULL, device.headers(), device.pull())
    door.close()
    return status


def test_a_device_joins_and_its_folder_is_its_own(server: Server, tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path / "device")
    told = fedbraid("server", "invite", str(server.folder.path), "clinic", "--json")
    token = json.loads(told.stdout)["token"]
    joined = join(server.url, token, folder, {"data": "/data/notes.jsonl"})
    assert folder.read() == joined
    assert (joined.name, joined.application) == ("clinic", bundle_hash())
    assert inquire(folder).name == "clinic"
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    assert files
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    # Neither private keys nor the token are on the server.
    secret = Token.parse(token).secret
    kept = b"".join(p.read_bytes() for p in server.folder.path.glob("enrolment.db*"))
    assert secret not in kept
    assert secret.hex().encode() not in kept
    with pytest.raises(NodeFolderError, match="already"):
        join(server.url, token, folder, {})
    leave(folder)
    assert not folder.path.exists()


def test_used_expired_unknown_and_broken_tokens(
    server: Server, device: Device, tmp_path: Path
) -> None:
    token = server.invite("other")
    join(server.url, str(token), NodeFolder(tmp_path / "first"), {})
    refused("used-token", server, token, tmp_path / "second")
    refused("unknown-token", server, server.invite("late", seconds=-1.0), tmp_path / "third")
    refused("unknown-token", server, Token.new(token.fingerprint), tmp_path / "third")
    refused("malformed-token", server, str(token)[:-1], tmp_path / "third")
    leave(NodeFolder(tmp_path / "first"))


def test_somebody_in_between_is_found_out(server: Server, tmp_path: Path) -> None:
    genuine = server.invite("clinic")
    # The server that answers is not the one whose authority the token names.
    foreign = Token(genuine.secret, bytes(32))
    refused("wrong-authority", server, foreign, tmp_path / "device")
    # It passes all on, the authority's certificate too, but has none that the authority signed.
    with in_between(server, tmp_path) as (url, overheard):
        with pytest.raises(EnrolmentRefused) as refusal:
            join(url, str(genuine), NodeFolder(tmp_path / "device"), {})
        assert refusal.value.kind == "wrong-authority"
    # It has not learnt the secret, so the token is still good.
    assert len(overheard) == 1
    assert genuine.secret.hex().encode() not in overheard[0]
    join(server.url, str(genuine), NodeFolder(tmp_path / "device"), {})
    leave(NodeFolder(tmp_path / "device"))


def test_a_revoked_node_is_refused_at_its_next_request(server: Server, tmp_path: Path) -> None:
    device = server.enrol("leaver", tmp_path / "device")
    assert pull(server, device) == 200
    done = fedbraid("server", "revoke", str(server.folder.path), "leaver")
    assert done.returncode == 0, done.stderr
    assert pull(server, device) == 401
    with pytest.raises(EnrolmentRefused) as refusal:
        inquire(device.folder)
    assert refusal.value.kind == "revoked"
    # Flower has forgotten it as well, so that no round waits for it.
    registry = Registry(server.folder.registry)
    control = FlowerControl(
        server.folder.ports().superlink, server.folder.loopback_identity.authority
    )
    assert "leaver" not in control.follow(registry)
    registry.close()
    again = fedbraid("server", "revoke", str(server.folder.path), "leaver")
    assert again.returncode == 2
    assert "Traceback" not in again.stderr
    # Leaving a server that has shut the node out only tidies up.
    leave(device.folder)
    assert not device.folder.path.exists()


def test_a_node_cannot_speak_for_another_nor_with_a_wrong_clock(
    server: Server, device: Device, tmp_path: Path
) -> None:
    stranger = NodeFolder(tmp_path / "stranger").transport_key()
    door = Door(server)
    strange = device.headers() | signed_headers(stranger, datetime.now(UTC))
    assert door.ask("POST", PULL, strange, device.pull())[0] == 401
    key = device.folder.transport_key()
    for wrong in (timedelta(minutes=10), timedelta(minutes=-10)):
        late = device.headers() | signed_headers(key, datetime.now(UTC) + wrong)
        assert door.ask("POST", PULL, late, device.pull())[0] == 401
    mixed = device.headers()
    mixed[FLEET_HTTP_PUBLIC_KEY_HEADER] = strange[FLEET_HTTP_PUBLIC_KEY_HEADER]
    assert door.ask("POST", PULL, mixed, device.pull())[0] == 401
    other = server.enrol("twin", tmp_path / "twin")
    # The front door knows the sender; Flower sees that the message names another node.
    assert door.ask("POST", PULL, other.headers(), device.pull())[0] == 401
    door.close()
    leave(other.folder)


def test_nothing_but_health_answers_without_credentials(server: Server) -> None:
    made, answered = open_routes(server)
    assert made > 100
    assert answered == {}


def test_who_has_an_account_signs_in_to_the_dashboard(server: Server) -> None:
    port = int(server.settings.dashboard.rpartition(":")[2])
    form = f"name=operator&password={PASSWORD.replace(' ', '+')}".encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    door = HTTPSConnection(LOOPBACK, port, context=server.tls(), timeout=60.0)
    door.request("POST", "/login", form, headers)
    answer = door.getresponse()
    answer.read()
    assert answer.status == 303
    cookie = answer.headers["set-cookie"]
    assert "secure" in cookie.lower()
    door.request("GET", "/api/v1/runs", headers={"Cookie": cookie.partition(";")[0]})
    shown = door.getresponse()
    assert shown.status == 200, shown.read()
    door.close()


def test_old_tls_is_not_spoken(server: Server) -> None:
    context = server.tls()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    door = Door(server, context=context)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        door.ask("GET", "/health")


def test_a_large_body_is_refused_and_not_kept_in_memory(server: Server, device: Device) -> None:
    large = send_large_bodies(server, device, 1024 * MEGABYTE)
    assert set(large.statuses.values()) == {413}
    assert large.growth <= 32 * MEGABYTE


def test_slow_sockets_are_cut_and_an_honest_node_works_on(
    server: Server, device: Device, tmp_path: Path
) -> None:
    slow = hold_sockets(server, device, server.enrol("slow", tmp_path / "slow"), 80)
    assert max(slow.lifetimes) < GIVE_UP_SECONDS
    assert slow.failures == 0
    assert len(slow.latencies) > 10


def test_replays_are_refused(server: Server, device: Device, tmp_path: Path) -> None:
    assert replay_request(server, device, 50) == Counter({401: 50})
    token = server.invite("once")
    server.enrol_with(token, tmp_path / "once")
    assert not replay_token(server, token, 10).keys() - {"used-token", "503"}


def test_status_tells_processes_and_nodes(server: Server, device: Device) -> None:
    done = fedbraid("server", "status", str(server.folder.path), "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0
    assert told["ready"]
    assert any(n["name"] == device.folder.read().name and not n["revoked"] for n in told["nodes"])
    running = fedbraid("server", "up", str(server.folder.path))
    assert running.returncode == 2
    assert "already running" in running.stderr
    assert status_of(server.folder.path) is not None


def test_every_process_is_started_again_and_nodes_are_served(
    server: Server, device: Device
) -> None:
    before = status_of(server.folder.path)
    assert before is not None
    for child in before["children"].values():
        os.kill(child["pid"], signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_SECONDS

    def mended() -> bool:
        now = status_of(server.folder.path)
        assert now is not None
        children = now["children"].values()
        return all(one["state"] == "ready" and one["restarts"] for one in children)

    while not mended():
        assert time.monotonic() < deadline, status_of(server.folder.path)
        time.sleep(0.1)
    assert pull(server, device) == 200


def test_the_bundle_names_the_apps_of_the_project_and_holds_no_code() -> None:
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    with zipfile.ZipFile(io.BytesIO(bundle())) as archive:
        names = {name for name in archive.namelist() if not name.startswith(".info/")}
        inner = tomllib.loads(archive.read("pyproject.toml").decode())
    assert names == {"pyproject.toml"}
    own, theirs = inner["tool"]["flwr"]["app"], project["tool"]["flwr"]["app"]
    assert own["components"] == theirs["components"]
    assert own["config"].keys() == theirs["config"].keys()


@pytest.mark.parametrize("url", ["http://a:1", "https://", "https://a:x", "a:1", "https://a/b"])
def test_a_url_that_is_none_is_told(url: str) -> None:
    with pytest.raises(NodeFolderError):
        address_of(url)
