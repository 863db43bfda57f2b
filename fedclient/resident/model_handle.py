"""The supervisor's hold on the model's process: start it, talk to it, stop it for a while, end it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys

from fedclient.resident import frames
from fedclient.resident.frames import Frame, FrameError
from fedclient.resident.settings import ResidentSettings


class ModelGone(Exception):
    """The model's process has ended, or no longer speaks."""


class ModelProcess:
    """One process; it is never reused after ``kill``."""

    def __init__(self, settings: ResidentSettings) -> None:
        """Start it. It says "ready" when its imports are done, seconds later."""
        ours, theirs = socket.socketpair()
        words = [sys.executable, "-m", "fedclient.resident.model_process"]
        words += ["--descriptor", str(theirs.fileno()), "--nice", str(settings.nice)]
        if settings.memory_bytes is not None:
            words += ["--memory-bytes", str(settings.memory_bytes)]
        if settings.cpus is not None:
            words += ["--cpus", str(settings.cpus)]
        # Idle OpenMP threads must not spin on a device that its user works on.
        environment = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            env={**environment, **os.environ}, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._connection = ours
        self._stopped = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def status(self) -> str:
        """How it ended, in words."""
        code = self._process.poll()
        if code is None:
            return "runs"
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def send(self, frame: Frame, seconds: float) -> None:
        """Hand it a frame. Raises ModelGone."""
        self._connection.settimeout(max(seconds, 0.1))
        try:
            frames.send(self._connection, frame)
        except OSError as error:
            raise ModelGone(str(error)) from None

    def receive(self, wait: float, seconds: float) -> Frame | None:
        """Its next frame; None if none begins within ``wait`` seconds. Raises ModelGone.

        A frame that has begun must end within ``seconds``.
        """
        if not select.select([self._connection], [], [], max(wait, 0.0))[0]:
            return None
        self._connection.settimeout(max(seconds, 0.1))
        try:
            return frames.receive(self._connection)
        except (EOFError, OSError, FrameError) as error:
            raise ModelGone(str(error) or "its socket is closed") from None

    def stop(self, stopped: bool) -> None:
        """Stop it where it is, or let it go on."""
        if stopped != self._stopped and self.alive:
            os.kill(self.pid, signal.SIGSTOP if stopped else signal.SIGCONT)
            self._stopped = stopped

    def kill(self) -> None:
        """End it, whatever it does. What it has on disk was written whole or not at all."""
        if self.alive:
            self._process.kill()
        self._process.wait()
        self._connection.close()
