"""The worker's gRPC service on a Unix socket: Capabilities, Work, Cancel, Health.

Messages are frames (``frames``). Capabilities and Work stream progress and end with the answer. The
folder's mode is what keeps others out: 0700, as ssh keeps its sockets.
"""

from __future__ import annotations

import fcntl
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import grpc

from fedclient.resident import frames
from fedclient.resident.connection import SERVICE, UNLIMITED
from fedclient.resident.frames import Frame, FrameError
from fedclient.resident.question import Question
from fedclient.resident.settings import ResidentSettings, SettingsError
from fedclient.resident.supervisor import Supervisor

CALLERS = 8


def serve(
    settings: ResidentSettings,
    stop: threading.Event | None = None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Run the worker until ``stop`` is set. ``ready`` is called when the socket answers.

    Raises SettingsError where the settings cannot work or another worker has the folder.
    """
    settings.check()
    settings.folder.mkdir(parents=True, exist_ok=True)
    settings.folder.chmod(0o700)
    lock = _locked(settings)
    supervisor = Supervisor(settings)
    server = grpc.server(ThreadPoolExecutor(CALLERS), options=UNLIMITED)
    server.add_generic_rpc_handlers((_handlers(supervisor),))
    # Left by a worker that was killed; the lock says that nobody serves it.
    settings.socket.unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{settings.socket}")
    server.start()
    settings.socket.chmod(0o600)
    try:
        ready()
        (stop or threading.Event()).wait()
    finally:
        supervisor.close()
        server.stop(grace=1.0).wait()
        settings.socket.unlink(missing_ok=True)
        lock.close()


def serve_until_signalled(settings: ResidentSettings, ready: Callable[[], None]) -> None:
    """``serve`` in the main thread of a process, until SIGTERM or SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    serve(settings, stop, ready)


def _handlers(supervisor: Supervisor) -> grpc.GenericRpcHandler:
    def stream(request: bytes, context: Any) -> Iterator[bytes]:
        try:
            question = Question.from_frame(frames.from_bytes(request))
        except FrameError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        for frame in supervisor.ask(question, context.is_active):
            yield frames.to_bytes(frame)

    def cancel(request: bytes, context: Any) -> bytes:
        count = supervisor.cancel(frames.from_bytes(request).header.get("nonce"))
        return frames.to_bytes(Frame({"cancelled": count}))

    def health(request: bytes, context: Any) -> bytes:
        return frames.to_bytes(Frame(supervisor.health()))

    methods = {
        "Capabilities": grpc.unary_stream_rpc_method_handler(stream),
        "Work": grpc.unary_stream_rpc_method_handler(stream),
        "Cancel": grpc.unary_unary_rpc_method_handler(cancel),
        "Health": grpc.unary_unary_rpc_method_handler(health),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


def _locked(settings: ResidentSettings) -> IO[str]:
    """One worker a folder; the lock ends with the process, however it ends."""
    file = (settings.folder / "worker.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SettingsError(
            f"{settings.folder}: another worker runs there; stop it first"
        ) from None
    return file
