"""Whether a process on this host answers. That its port is open says little: it may hang."""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path

import grpc

from fedhost.ports import LOOPBACK

PROBE_SECONDS = 2.0


def answers_http(port: int) -> bool:
    """Whether an HTTP server answers at all."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", "/health")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def answers_https(port: int, host: str = LOOPBACK, authority: Path | None = None) -> bool:
    """Whether a server on this host says over TLS that it is well (200 at /health).

    ``authority`` (PEM): its certificate must also hold, for any name: the one in a given certificate may
    not be the address that this host calls itself by. Without it the certificate is not judged: who
    serves with one that has expired is alive, and would not be mended by another start.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE if authority is None else ssl.CERT_REQUIRED
    connection = http.client.HTTPSConnection(host, port, timeout=PROBE_SECONDS, context=context)
    try:
        if authority is not None:
            context.load_verify_locations(authority)
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def answers_grpc(port: int) -> bool:
    """Whether a server of gRPC's health service answers."""
    with grpc.insecure_channel(f"{LOOPBACK}:{port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            check(b"", timeout=PROBE_SECONDS, wait_for_ready=True)
        except grpc.RpcError:
            return False
    return True
