"""Whether a process answers is one question, whether its certificate holds another."""

from __future__ import annotations

import ssl
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fedhost.ports import LOOPBACK, free_ports
from fedhost.probes import answers_https
from fedserver.deployment import certificates
from fedserver.deployment.certificates import make_authority, make_server_certificate
from fedserver.deployment.folder import ServerFolder
from fedserver.deployment.front_door import is_refused
from fedserver.deployment.processes import children


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_server_lives_whose_certificate_has_expired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = make_authority(tmp_path / "authority")
    other = make_authority(tmp_path / "other").certificate
    good = make_server_certificate(tmp_path / "good", authority, [])
    monkeypatch.setattr(certificates, "SERVER_DAYS", timedelta(minutes=-1) / timedelta(days=1))
    expired = make_server_certificate(tmp_path / "expired", authority, [])
    monkeypatch.undo()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(good.certificate, good.key)
    with HTTPServer((LOOPBACK, 0), Healthy) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            port = server.server_address[1]
            folder = ServerFolder(tmp_path / "server")
            given = {"certificate": good.certificate, "key": good.key, "authority": other}
            settings = folder.prepare(
                {"listen": f"{LOOPBACK}:{port}", **{k: str(v) for k, v in given.items()}}
            )
            nginx = children(folder, settings, folder.choose_ports())[-1]
            assert answers_https(port, authority=authority.certificate)
            assert not is_refused(LOOPBACK, port, authority.certificate)
            context.load_cert_chain(expired.certificate, expired.key)
            for pinned in (authority.certificate, other, expired.key, tmp_path / "none"):
                assert not answers_https(port, authority=pinned)
                assert is_refused(LOOPBACK, port, pinned)
            other.unlink()
            assert nginx.ready()
        finally:
            server.shutdown()
            thread.join()
    assert not nginx.ready()
    assert not is_refused(LOOPBACK, port, authority.certificate)
    assert not answers_https(free_ports(1)[0])
