"""The generated configuration as nginx itself reads it, and what a server refuses to start with."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from fedhost.ports import LOOPBACK, free_ports
from fedserver.dashboard.accounts import Accounts
from fedserver.deployment.certificates import make_authority, make_server_certificate
from fedserver.deployment.folder import FolderError, ServerFolder, Settings
from fedserver.deployment.front_door import FLEET_ROUTES, FrontDoor, FrontDoorError
from fedserver.deployment.processes import check_startable, children


@pytest.fixture
def door(tmp_path: Path) -> Callable[..., FrontDoor]:
    authority = make_authority(tmp_path / "authority")
    identity = make_server_certificate(tmp_path / "own", authority, [])

    def make(host: str = LOOPBACK, dashboard: str = "") -> FrontDoor:
        return FrontDoor(
            host, 8443, identity, 8001, authority.certificate, 8002, 64, dashboard, 8003
        )

    return make


def test_nginx_accepts_it_and_listens_with_tls_13_only(
    door: Callable[..., FrontDoor], tmp_path: Path
) -> None:
    for host in (LOOPBACK, "0.0.0.0", "::"):
        command = door(host).write(tmp_path / "nginx")
        dump = subprocess.run([*command, "-T"], capture_output=True, text=True, check=True).stdout
        listens = re.findall(r"^\s*listen (.*);", dump, re.MULTILINE)
        assert len(listens) == 1
        assert "ssl" in listens[0].split()
        assert re.findall(r"ssl_protocols (.*);", dump)[0] == "TLSv1.3"


def test_the_dashboard_has_a_port_of_its_own_with_tls_13(
    door: Callable[..., FrontDoor], tmp_path: Path
) -> None:
    for host in (LOOPBACK, "0.0.0.0", "[::]"):
        command = door(LOOPBACK, f"{host}:8444").write(tmp_path / "nginx")
        dump = subprocess.run([*command, "-T"], capture_output=True, text=True, check=True).stdout
        servers = dump.split("  server {")
        assert len(servers) == 3
        assert "listen 127.0.0.1:8443 ssl" in servers[1]
        assert "http://dashboard" not in servers[1].partition("upstream dashboard")[0]
        assert f"listen {host}:8444 ssl" in servers[2]
        assert "TLSv1.3;" in servers[2]
        assert "superlink" not in servers[2].partition("upstream")[0]


def test_the_dashboard_is_shown_to_nobody_without_an_account(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path / "server")
    listen, dashboard = (f"{LOOPBACK}:{port}" for port in free_ports(2))
    settings = folder.prepare({"listen": listen, "dashboard": dashboard})
    with pytest.raises(FolderError, match="fedbraid accounts add"):
        check_startable(folder, settings)
    Accounts(folder.runs).add("me", "operator", "a long password")
    check_startable(folder, settings)
    names = [child.name for child in children(folder, settings, folder.choose_ports())]
    assert names.index("dashboard") < names.index("nginx")
    assert "dashboard" not in [
        child.name for child in children(folder, folder.prepare({"dashboard": ""}), folder.ports())
    ]


def test_only_flowers_fleet_routes_lead_to_the_superlink(door: Callable[..., FrontDoor]) -> None:
    locations = re.findall(
        r"location ([^{]+) \{(.*?)\n    \}", door().configuration(Path("/x")), re.DOTALL
    )
    open_ = {name.strip() for name, body in locations if "superlink" in body}
    assert open_ == {f"= /v1/fleet/{route}" for route in FLEET_ROUTES}
    known = {path for _, path in PROTOBUF_REQUEST_TYPES}
    assert {name.removeprefix("= ") for name in open_} <= known
    assert all("auth_request /gatekeeper" in body for _, body in locations if "superlink" in body)


def test_without_nginx_or_with_a_bad_certificate_the_reason_is_told(
    door: Callable[..., FrontDoor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = door()
    broken.identity.key.write_text("no key")
    with pytest.raises(FrontDoorError, match="refuses"):
        broken.write(tmp_path / "nginx")
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(FrontDoorError, match="apt-get install nginx"):
        door().write(tmp_path / "nginx")


def test_what_is_reachable_from_elsewhere_needs_a_name_in_its_certificate() -> None:
    Settings(listen="127.0.0.1:1").check()
    Settings(listen="0.0.0.0:1", names=("fed.example.org",)).check()
    for bad in (
        Settings(listen="0.0.0.0:8443"),
        Settings(listen="[::]:8443"),
        Settings(listen="8443"),
        Settings(listen="host:8443"),
        Settings(listen="127.0.0.1:70000"),
        Settings(certificate="a.pem"),
        Settings(dashboard="0.0.0.0:8444"),
        Settings(dashboard="127.0.0.1:8443"),
        Settings(dashboard="8444"),
        Settings(names=("a; include /etc/passwd",)),
    ):
        with pytest.raises(FolderError):
            bad.check()


def test_everything_but_nginx_listens_on_loopback(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path / "server")
    settings = folder.prepare({"listen": "0.0.0.0:8443", "names": ("fed.example.org",)})
    for child in children(folder, settings, folder.choose_ports())[:3]:
        words = list(child.command)
        assert "0.0.0.0" not in " ".join(words)
        if "--host" in words:
            assert words[words.index("--host") + 1] == LOOPBACK
    superlink = children(folder, settings, folder.ports())[0].command
    assert "--enable-supernode-auth" in superlink
    assert "--insecure" not in superlink


def test_a_taken_port_is_told_with_its_holder(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path / "server")
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = folder.prepare({"listen": f"{LOOPBACK}:{port}"})
        with pytest.raises(FolderError, match=rf"{port} is taken by .*process"):
            check_startable(folder, settings)


def test_settings_are_remembered_and_ports_kept_while_free(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path / "server")
    listen = f"{LOOPBACK}:{free_ports(1)[0]}"
    folder.prepare({"listen": listen, "names": ("a.example",)})
    assert folder.prepare({}) == folder.settings() == Settings(listen=listen, names=("a.example",))
    ports = folder.choose_ports()
    assert folder.choose_ports() == ports
    with socket.socket() as taken:
        taken.bind((LOOPBACK, ports.gatekeeper))
        taken.listen()
        assert folder.choose_ports().gatekeeper != ports.gatekeeper
    with pytest.raises(FolderError):
        ServerFolder(tmp_path / "elsewhere").settings()


def test_ports_of_an_older_version_are_told_from_none(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path / "server")
    folder.prepare({})
    with pytest.raises(FolderError, match="never run"):
        folder.ports()
    (folder.path / "ports.json").write_text('{"superlink": 1, "superexec_health": 2}')
    with pytest.raises(FolderError, match="another version"):
        folder.ports()
    assert folder.choose_ports() == folder.ports()
