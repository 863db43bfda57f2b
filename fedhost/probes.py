"""Whether a process on this host answers. That its port is open says little: it may hang."""

from __future__ import annotations

import http.client

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


def answers_grpc(port: int) -> bool:
    """Whether a server of gRPC's health service answers."""
    with grpc.insecure_channel(f"{LOOPBACK}:{port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            check(b"", timeout=PROBE_SECONDS, wait_for_ready=True)
        except grpc.RpcError:
            return False
    return True
