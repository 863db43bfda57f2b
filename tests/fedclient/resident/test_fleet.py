"""A SuperNode waits out what passes, and signs by the time of the server that judges it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.heartbeat import HeartbeatFailure
from flwr.supercore.protobuf.client import ProtobufRequestContext
from hypothesis import example, given
from hypothesis import strategies as st

from fedclient.resident.fleet import (
    SERVER_ERROR_SECONDS,
    Heartbeat,
    TimedSignature,
    patient_invoker,
)
from fedclient.resident.server_clock import CLOSE_SECONDS, ServerClock
from fedhost.enrolment import EnrolmentRefused
from fedhost.node_signature import read_signed, signed_headers

KEY = ec.generate_private_key(ec.SECP256R1())
SKEWS = st.floats(-3e7, 3e7)


def answered(status: int, content: str = "") -> httpx.HTTPStatusError:
    request, response = (
        httpx.Request("POST", "https://server/"),
        httpx.Response(status, text=content),
    )
    return httpx.HTTPStatusError("", request=request, response=response)


@given(SKEWS)
def test_a_clock_follows_what_was_heard(skew: float) -> None:
    clock = ServerClock()
    there = datetime.now(UTC) + timedelta(seconds=skew)
    moved = clock.hear(format_datetime(there, usegmt=True))
    assert abs((clock.now() - there).total_seconds()) < CLOSE_SECONDS + 2
    assert abs(clock.device_is_ahead + skew) < CLOSE_SECONDS + 2
    assert moved or abs(skew) < CLOSE_SECONDS + 2


# Dates, all but: any day, any number of digits for the year, any offset.
DATES = st.from_regex(
    r"(Fri, )?[0-9]{1,3} (Jan|Dec) [0-9]{1,20} [0-9]{1,2}:[0-9]{2}:[0-9]{2} ([+-][0-9]{1,6}|GMT)?",
    fullmatch=True,
)


@given(st.one_of(st.none(), st.text(), DATES))
@example("Fri, 31 Dec 9999 23:59:59 -2300")
@example("Fri, 31 Dec 9999 23:59:59 GMT")
@example("Fri, 31 Dec 20261231202612312026 23:59:59 GMT")
@example("Mon, 01 Jan 0001 00:00:00 GMT")
def test_a_clock_hears_no_nonsense(date: str | None) -> None:
    clock = ServerClock()
    moved = clock.hear(date)
    assert moved or abs(clock.device_is_ahead) < CLOSE_SECONDS
    # Whatever it heard, requests can be signed by it.
    signed_headers(KEY, clock.now() + timedelta(days=300))


@given(SKEWS)
def test_a_request_of_a_wrong_clock_is_signed_again(skew: float) -> None:
    sent = []

    def server(context: ProtobufRequestContext) -> httpx.Response:
        now = datetime.now(UTC) + timedelta(seconds=skew)
        try:
            sent.append(read_signed(context.request.headers, now.timestamp()))
            status = 200
        except EnrolmentRefused:
            status = 401
        return httpx.Response(status, headers={"Date": format_datetime(now, usegmt=True)})

    request = httpx.Request("POST", "https://server/v1/fleet/pull-messages", content=b"x")
    context = ProtobufRequestContext("PullMessages", PullMessagesRequest(), request)
    signs = TimedSignature.by(ServerClock())(KEY, KEY.public_key())
    for _ in range(2):
        assert signs.intercept(context, server).status_code == 200
    # The second request is right at once, and is not the first one again.
    assert len({one.text for one in sent}) == len(sent) == 2


def test_of_two_refused_threads_both_sign_again() -> None:
    """Both were signed by the wrong time; the second is answered when the first has set the clock."""
    both_signed, first_done = threading.Barrier(2), threading.Event()
    signs = TimedSignature.by(ServerClock())(KEY, KEY.public_key())
    ends: dict[str, int] = {}

    def speak(name: str) -> None:
        refused = False

        def server(context: ProtobufRequestContext) -> httpx.Response:
            nonlocal refused
            now = datetime.now(UTC) + timedelta(hours=1)
            date = {"Date": format_datetime(now, usegmt=True)}
            if not refused:
                refused = True
                both_signed.wait()
                if name == "second":
                    first_done.wait()
                return httpx.Response(401, headers=date)
            read_signed(context.request.headers, now.timestamp())
            return httpx.Response(200, headers=date)

        request = httpx.Request("POST", "https://server/v1/fleet/pull-messages", content=b"x")
        context = ProtobufRequestContext("PullMessages", PullMessagesRequest(), request)
        try:
            ends[name] = signs.intercept(context, server).status_code
        finally:
            if name == "first":
                first_done.set()

    threads = [threading.Thread(target=speak, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == {"first": 200, "second": 200}


def test_what_is_refused_at_the_right_time_is_sent_once() -> None:
    sent = []

    def server(context: ProtobufRequestContext) -> httpx.Response:
        sent.append(context)
        return httpx.Response(
            401, headers={"Date": format_datetime(datetime.now(UTC), usegmt=True)}
        )

    request = httpx.Request("POST", "https://server/v1/fleet/pull-messages", content=b"x")
    context = ProtobufRequestContext("PullMessages", PullMessagesRequest(), request)
    signs = TimedSignature.by(ServerClock())(KEY, KEY.public_key())
    assert signs.intercept(context, server).status_code == 401
    assert len(sent) == 1


def test_what_passes_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    gives_up = patient_invoker().should_giveup
    assert gives_up is not None
    assert not gives_up(httpx.ConnectTimeout("_ssl.c:990: The handshake operation timed out"))
    assert gives_up(
        httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    )
    assert not gives_up(answered(503))
    assert gives_up(answered(400))
    still_there = json.dumps({"code": int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED), "detail": ""})
    assert not gives_up(answered(412, still_there))
    clock[0] = 10 * SERVER_ERROR_SECONDS
    for clock[0] in (11 * SERVER_ERROR_SECONDS, 12 * SERVER_ERROR_SECONDS):
        assert not gives_up(answered(500))
    clock[0] += 1
    assert gives_up(answered(500)), "such a server is for a process that starts anew"
    clock[0] += 2 * SERVER_ERROR_SECONDS
    assert not gives_up(answered(500)), "another trouble, later"


def test_an_error_does_not_end_the_heartbeat() -> None:
    def fails() -> bool:
        raise answered(500)

    with pytest.raises(HeartbeatFailure):
        Heartbeat(fails)._heartbeat()
    program = (
        "from fedclient.resident.fleet import Heartbeat\n"
        "def unknown(): raise RuntimeError('The SuperLink does not recognize this SuperNode.')\n"
        "heart = Heartbeat(unknown)\n"
        "heart.start()\n"
        "heart._thread.join()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "recognize" in done.stderr
