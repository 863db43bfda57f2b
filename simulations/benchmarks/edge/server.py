"""A real server in a temporary folder, with devices that have joined it; what they say over TLS."""

from __future__ import annotations

import http.client
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from fedclient.deployment.joining import join, trusting
from fedclient.deployment.settings import NodeFolder
from fedhost.enrolment import Token, fingerprint_of
from fedhost.node_signature import public_pem, signed_headers
from fedhost.ports import LOOPBACK, free_ports
from fedhost.supervision import status_of, stop
from fedserver.dashboard.accounts import OPERATOR, Accounts
from fedserver.deployment.folder import ServerFolder, Settings
from fedserver.deployment.registry import Registry

HEARTBEAT_SECONDS = 30.0
PASSWORD = "a password of tests"
PULL = "/v1/fleet/pull-messages"


@dataclass(frozen=True)
class Server:
    """A server that is up. ``settings.port`` is its front door."""

    folder: ServerFolder
    settings: Settings

    @property
    def url(self) -> str:
        """Where devices join."""
        return f"https://{self.settings.address}"

    def tls(self) -> ssl.SSLContext:
        """TLS as a device has it."""
        return trusting(self.folder.identity(self.settings).authority.read_bytes())

    def invite(self, name: str, seconds: float = 3600.0) -> Token:
        """A token for one device."""
        token = Token.new(
            fingerprint_of(self.folder.identity(self.settings).authority.read_bytes())
        )
        registry = Registry(self.folder.registry)
        registry.invite(name, token, time.time() + seconds)
        registry.close()
        return token

    def enrol(self, name: str, folder: Path) -> Device:
        """A device that has joined."""
        return self.enrol_with(self.invite(name), folder)

    def enrol_with(self, token: Token, folder: Path) -> Device:
        """A device that has joined by this token."""
        opened = NodeFolder(folder)
        join(self.url, str(token), opened, {})
        return Device(self, opened)

    def memory_bytes(self) -> int:
        """Memory of all of the server's processes (proportional set size)."""
        told = status_of(self.folder.path)
        assert told is not None
        total = 0
        for child in told["children"].values():
            try:
                root = psutil.Process(child["pid"])
                for process in [root, *root.children(recursive=True)]:
                    total += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
        return total


class Door:
    """One kept connection to the front door; reconnects when the server has closed it."""

    def __init__(
        self, server: Server, context: ssl.SSLContext | None = None, port: int | None = None
    ) -> None:
        self._connection = http.client.HTTPSConnection(
            LOOPBACK, port or server.settings.port, timeout=60.0, context=context or server.tls()
        )

    def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> tuple[int, bytes]:
        """One request: status and body."""
        for fresh in (False, True):
            try:
                self._connection.request(method, path, body or None, dict(headers or {}))
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except (http.client.RemoteDisconnected, ConnectionError, ssl.SSLError):
                self._connection.close()
                if fresh:
                    raise
        raise AssertionError

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Device:
    """A joined device that speaks Flower's protocol without a SuperNode."""

    def __init__(self, server: Server, folder: NodeFolder) -> None:
        self.folder = folder
        self._key = folder.transport_key()
        door = Door(server)
        request = ActivateNodeRequest(
            public_key=public_pem(self._key).encode(), heartbeat_interval=HEARTBEAT_SECONDS
        )
        status, content = door.ask(
            "POST", "/v1/fleet/activate-node", self.headers(), request.SerializeToString()
        )
        assert status == 200, (status, content)
        self.node_id = _activated(content)
        door.close()

    def headers(self) -> dict[str, str]:
        """Headers of a new request: signed now."""
        return {
            "Content-Type": PROTOBUF_MEDIA_TYPE,
            **signed_headers(self._key, datetime.now(UTC)),
        }

    def pull(self) -> bytes:
        """The body of a request for messages."""
        body: bytes = PullMessagesRequest(node=Node(node_id=self.node_id)).SerializeToString()
        return body


def _activated(content: bytes) -> int:
    answer = ActivateNodeResponse()
    answer.ParseFromString(content)
    return int(answer.node_id)


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """``fedbraid server up`` on free loopback ports, with a dashboard; stopped in the end."""
    listen, dashboard = (f"{LOOPBACK}:{port}" for port in free_ports(2))
    runs = ServerFolder(folder).runs
    runs.mkdir(parents=True)
    Accounts(runs).add("operator", OPERATOR, PASSWORD)
    command = [sys.executable, "-m", "simulations.command", "server", "up", str(folder)]
    try:
        command += ["--listen", listen, "--dashboard", dashboard]
        subprocess.run(command, check=True, capture_output=True, text=True)
        opened = ServerFolder(folder.resolve())
        yield Server(opened, opened.settings())
    except subprocess.CalledProcessError as error:
        raise RuntimeError(error.stderr) from None
    finally:
        stop(folder.resolve())
