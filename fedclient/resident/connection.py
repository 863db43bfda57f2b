"""Asking the resident worker: what the stub and ``client status`` use. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from fedclient.node import Kind, NodeSettings, Refused
from fedclient.resident import frames
from fedclient.resident.frames import Frame
from fedclient.resident.question import Question

SERVICE = "fedbraid.Worker"
# A message may be as large as Flower's own: the plan's limits are checked where plans are.
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
RECONNECTION = [
    # A worker that is restarted is back within seconds, not within gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
UNREACHABLE_SECONDS = 45.0
# Beyond the deadline that the worker itself keeps: only a worker that hangs lets it pass.
DEADLINE_GRACE_SECONDS = 15.0

Tell = Callable[[dict[str, Any]], None]


class Connection:
    """A channel to one worker's socket; a context manager."""

    def __init__(self, socket: str | Path, patience: float = UNREACHABLE_SECONDS) -> None:
        """``patience``: seconds without a worker after which a question is given up."""
        self._socket = socket
        self._patience = patience
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=UNLIMITED + RECONNECTION)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def answer(
        self,
        kind: Kind,
        payload: bytes,
        settings: NodeSettings,
        tell: Tell = lambda progress: None,
    ) -> Frame:
        """The worker's answer: its bytes, and in the header the ``memory`` that the work took.

        Raises Refused with its reason, RuntimeError for a defect of the worker.

        A worker that dies meanwhile is asked again when it is back: the same question has one answer.
        """
        question = Question(kind, payload, settings)
        request = frames.to_bytes(question.to_frame())
        ends = time.monotonic() + question.seconds + DEADLINE_GRACE_SECONDS
        while True:
            self.health()
            try:
                return self._ask(kind, request, max(ends - time.monotonic(), 0.1), tell)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    text = (
                        f"deadline: no answer within {question.seconds:g} s from a hanging worker"
                    )
                    raise Refused(text, "deadline") from None
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise RuntimeError(f"{error.code().name}: {error.details()}") from None

    def health(self) -> dict[str, Any]:
        """What the worker does now. Raises Refused ("unreachable") if there is none."""
        call = self._channel.unary_unary(f"/{SERVICE}/Health")
        until = time.monotonic() + self._patience
        while True:
            try:
                reply = call(
                    frames.to_bytes(Frame({})),
                    timeout=max(until - time.monotonic(), 0.1),
                    wait_for_ready=True,
                )
                return frames.from_bytes(reply).header
            except grpc.RpcError:
                if time.monotonic() >= until:
                    text = f"unreachable: no worker answers at {self._socket}; start it again"
                    raise Refused(text, "unreachable") from None

    def cancel(self, nonce: str | None = None) -> int:
        """Cancel the work on the plan with this nonce, or all; returns how many works."""
        call = self._channel.unary_unary(f"/{SERVICE}/Cancel")
        reply = call(frames.to_bytes(Frame({"nonce": nonce})), timeout=self._patience)
        return int(frames.from_bytes(reply).header["cancelled"])

    def _ask(self, kind: Kind, request: bytes, seconds: float, tell: Tell) -> Frame:
        method = "Capabilities" if kind == "query" else "Work"
        for message in self._channel.unary_stream(f"/{SERVICE}/{method}")(request, timeout=seconds):
            frame = frames.from_bytes(message)
            header = frame.header
            if header["event"] == "reply":
                return frame
            if header["event"] == "refused":
                raise Refused(str(header["error"]), str(header["reason"]))
            if header["event"] == "defect":
                raise RuntimeError(str(header["error"]))
            tell(header)
        raise RuntimeError("the worker's stream ended without an answer")
