"""How a SuperNode speaks to its SuperLink over a network that fails: it waits, and does not fall silent.

Flower 1.41 gives up for good where it should try again. An error with "ssl" in its text ends its loop,
and a TLS handshake that times out has that; a heartbeat that is answered with an error ends the
thread of heartbeats; a reply that meets an error of the server (its database is busy, its disk
full) is dropped.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.heartbeat import HeartbeatFailure, HeartbeatSender
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker

from fedclient.resident.server_clock import CLOSE_SECONDS, ServerClock
from fedhost.node_signature import signed_headers

# How long a server that answers with an error of its own is asked again; then the SuperNode starts anew.
SERVER_ERROR_SECONDS = 120.0
# A certificate that does not hold is no matter of patience.
UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"


def patient_invoker() -> RetryInvoker:
    """Flower's retries, which go on after a broken handshake, too, and after what may pass."""
    invoker = make_simple_http_retry_invoker()
    flowers: Callable[[Exception], bool] = invoker.should_giveup or (lambda error: False)
    first = last = float("-inf")

    def should_giveup(error: Exception) -> bool:
        nonlocal first, last
        if isinstance(error, httpx.TransportError):
            return UNTRUSTED in str(error)
        if not isinstance(error, httpx.HTTPStatusError) or not _may_pass(error.response):
            return flowers(error)
        now = time.monotonic()
        if now - last > SERVER_ERROR_SECONDS:
            first = now
        last = now
        return now - first > SERVER_ERROR_SECONDS

    invoker.should_giveup = should_giveup
    return invoker


def _may_pass(response: httpx.Response) -> bool:
    """Whether it is an error of the server, or it believes this node to be connected still."""
    if response.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
        return True
    told = FlowerError.from_json(response.text)
    return told is not None and told.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED


class Heartbeat(HeartbeatSender):
    """Flower's heartbeat, which an error does not end.

    Where the SuperLink does not know the node any more the process ends: started again, it says who
    it is.
    """

    def _heartbeat(self) -> None:
        try:
            super()._heartbeat()
        except httpx.HTTPError:
            raise HeartbeatFailure from None
        except RuntimeError as error:
            print(f"heartbeat: {error}", file=sys.stderr, flush=True)
            os._exit(1)


class TimedSignature:
    """Flower's interceptor that signs requests, by the server's time instead of the device's.

    A request that is refused for its time is signed and sent once more.
    """

    def __init__(
        self,
        clock: ServerClock,
        private_key: ec.EllipticCurvePrivateKey,
        public_key: ec.EllipticCurvePublicKey,
    ) -> None:
        """``public_key`` is ``private_key``'s: Flower hands over both."""
        self._clock = clock
        self._key = private_key

    @classmethod
    def by(cls, clock: ServerClock) -> Callable[..., TimedSignature]:
        """What stands for Flower's class, which takes the keys alone."""
        return partial(cls, clock)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Sign the request and send it."""
        signed = self._clock.now()
        response = self._sent(context, call_next, signed)
        self._clock.hear(response.headers.get("date"))
        if response.status_code != httpx.codes.UNAUTHORIZED:
            return response
        # Whichever thread's answer has set the clock: what counts is whether this request was off.
        now = self._clock.now()
        if abs((now - signed).total_seconds()) > CLOSE_SECONDS:
            response = self._sent(context, call_next, now)
        return response

    def _sent(
        self, context: ProtobufRequestContext, call_next: ProtobufCall, signed: datetime
    ) -> httpx.Response:
        context.request.headers.update(signed_headers(self._key, signed))
        return call_next(context)
