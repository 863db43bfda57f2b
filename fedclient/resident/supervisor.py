"""The supervisor: one process with the model, watched, bounded in time, and replaced when it dies.

A question that several callers ask at once is worked on once, and goes on when they are gone: whoever
asks again gets the same bytes. Work that does not stop when it must is killed with its process;
residuals and replies are written whole or not at all.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fedclient.resident import pauses
from fedclient.resident.frames import Frame
from fedclient.resident.model_handle import ModelGone, ModelProcess
from fedclient.resident.question import Question
from fedclient.resident.replies import Replies
from fedclient.resident.settings import ResidentSettings

# A question that has killed so many processes is not tried again.
ATTEMPTS = 3
FIRST_BACKOFF, LONGEST_BACKOFF = 0.25, 30.0
LOOK_SECONDS = 0.1
INTERRUPT_SECONDS = 5.0
PAUSE_LOOK_SECONDS = 5.0


@dataclass(eq=False)
class Job:
    """A question that is being worked on, and what its callers are to hear."""

    question: Question
    identity: str
    ends: float
    spoken: list[Frame] = field(default_factory=list)
    answer: Frame | None = None
    callers: int = 0
    cancelled: str = ""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def say(self, frame: Frame) -> None:
        """Progress, for whoever listens."""
        with self.changed:
            self.spoken.append(frame)
            self.changed.notify_all()

    def finish(self, frame: Frame) -> None:
        """The answer."""
        with self.changed:
            self.answer = frame
            self.changed.notify_all()


class Supervisor:
    """Answers questions through a model's process of its own. ``ask`` may be called by any thread."""

    def __init__(self, settings: ResidentSettings) -> None:
        """Begin to load the model's process."""
        self._settings = settings
        self._replies = Replies(settings.folder / "replies")
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._queue: queue.Queue[Job] = queue.Queue()
        self._closing = threading.Event()
        self._model: ModelProcess | None = None
        self._ready = False
        self._deaths = 0
        self._starts = 0
        self._number = 0
        self._paused = ""
        self._looked = float("-inf")
        self._last: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def ask(self, question: Question, heard: Callable[[], bool]) -> Iterator[Frame]:
        """Progress frames, then one answer. Ends early when ``heard`` says that nobody listens."""
        found = self._join(question)
        if isinstance(found, Frame):
            yield Frame({**found.header, "stored": True}, found.payload)
            return
        try:
            yield from _hear(found, heard)
        finally:
            with self._lock:
                found.callers -= 1

    def _join(self, question: Question) -> Job | Frame:
        """The reply that is on disk, or the work on the question, begun if need be."""
        identity = question.identity
        with self._lock:
            stored = self._replies.get(identity) if question.lasting else None
            if stored is not None:
                return stored
            job = self._jobs.get(identity)
            if job is None or job.cancelled:
                job = Job(question, identity, time.monotonic() + question.seconds)
                self._jobs[identity] = job
                self._queue.put(job)
            job.callers += 1
            # A later question means that nobody waits for what was left behind.
            for other in self._jobs.values():
                if other.callers == 0 and other is not job:
                    other.cancelled = "another question came, and nobody waited for this one"
            return job

    def cancel(self, nonce: str | None, why: str = "cancelled on request") -> int:
        """Cancel the work on one plan, by its nonce, or all work; returns how many were."""
        with self._lock:
            jobs = [j for j in self._jobs.values() if nonce in (None, j.question.plan.get("nonce"))]
            for job in jobs:
                job.cancelled = why
        return len(jobs)

    def health(self) -> dict[str, Any]:
        """What the worker does now: JSON values."""
        model = self._model
        with self._lock:
            waiting = len(self._jobs)
        state = "working" if waiting else "ready" if self._ready else "starting"
        return {
            "state": "paused" if self._paused else state,
            "paused": self._paused,
            "questions": waiting,
            "model_pid": model.pid if model is not None else None,
            "starts": self._starts,
            "progress": self._last,
        }

    def close(self) -> None:
        """End the model's process and answer those who wait."""
        self._closing.set()
        self.cancel(None, "the worker is being stopped")
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                job = self._queue.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                self._keep_warm()
                continue
            try:
                answer = self._work(job)
            except Exception as error:  # A defect here must not leave callers waiting for ever.
                answer = Frame({"event": "defect", "error": f"{type(error).__name__}: {error}"})
            with self._lock:
                if self._jobs.get(job.identity) is job:
                    del self._jobs[job.identity]
            self._last = {}
            job.finish(answer)
        self._drop()
        while not self._queue.empty():
            self._queue.get().finish(_refused("cancelled", "the worker is being stopped"))

    def _work(self, job: Job) -> Frame:
        """One question, by as many processes as it takes and is allowed."""
        for _ in range(ATTEMPTS):
            try:
                answer = self._attempt(job)
            except ModelGone:
                self._died()
                continue
            if answer.header["event"] == "reply":
                self._deaths = 0
                self._keep(job, answer)
            elif answer.header["event"] == "defect" or answer.header.get("spent"):
                self._drop()
            return answer
        return _refused("died", f"died: the worker's process ended {ATTEMPTS} times at this work")

    def _keep(self, job: Job, reply: Frame) -> None:
        if not job.question.lasting:
            return
        try:
            self._replies.put(job.identity, reply)
        except OSError as error:
            # A full disk costs the second answer, not the first.
            print(f"worker: the reply could not be kept: {error}", file=sys.stderr, flush=True)

    def _attempt(self, job: Job) -> Frame:
        """Hand the question to a process that is ready, and watch. Raises ModelGone."""
        asked = False
        while True:
            left = job.ends - time.monotonic()
            if left <= 0 or job.cancelled:
                if asked:
                    self._interrupt()
                return self._unfinished(job)
            held = self._look()
            model = self._started()
            model.stop(bool(held) and asked)
            if held and not asked:
                self._closing.wait(min(LOOK_SECONDS, left))
                continue
            if self._ready and not asked:
                self._number += 1
                question = job.question.to_frame()
                model.send(
                    Frame({**question.header, "number": self._number}, question.payload), left
                )
                asked = True
            frame = model.receive(min(LOOK_SECONDS, left), left)
            if frame is None:
                if not model.alive:
                    raise ModelGone(model.status)
            elif frame.header["event"] == "ready":
                self._ready = True
            elif frame.header["event"] == "progress":
                self._last = frame.header
                job.say(frame)
            else:
                return frame

    def _interrupt(self) -> None:
        """Stop the work: by asking the process, and if it does not listen, by ending it."""
        model = self._started()
        until = time.monotonic() + INTERRUPT_SECONDS
        try:
            model.stop(False)
            model.send(Frame({"cancel": self._number}), INTERRUPT_SECONDS)
            while (left := until - time.monotonic()) > 0:
                frame = model.receive(left, left)
                if frame is not None and frame.header["event"] in ("reply", "refused"):
                    return
        except ModelGone:
            pass
        self._drop()

    def _unfinished(self, job: Job) -> Frame:
        if job.cancelled:
            return _refused("cancelled", f"cancelled: {job.cancelled}")
        if self._paused:
            return _refused("paused", f"paused: {self._paused}, until the deadline had passed")
        text = f"deadline: the work took more than {job.question.seconds:g} s and was stopped"
        return _refused("deadline", text)

    def _look(self) -> str:
        """Why the device should not work now; asked for every few seconds."""
        now = time.monotonic()
        if now - self._looked >= PAUSE_LOOK_SECONDS:
            self._paused = pauses.paused(self._settings)
            self._looked = now
        return self._paused

    def _started(self) -> ModelProcess:
        if self._model is None:
            self._ready = False
            self._model = ModelProcess(self._settings)
            self._starts += 1
        return self._model

    def _keep_warm(self) -> None:
        """Between questions: a process that is there and ready, so that the next one need not wait."""
        try:
            frame = self._started().receive(0.0, 5.0)
            if frame is not None and frame.header["event"] == "ready":
                self._ready = True
        except ModelGone:
            self._died()

    def _died(self) -> None:
        """Wait longer after every death in a row: what kills it may last."""
        self._drop()
        self._closing.wait(min(FIRST_BACKOFF * 2**self._deaths, LONGEST_BACKOFF))
        self._deaths += 1

    def _drop(self) -> None:
        model, self._model, self._ready = self._model, None, False
        if model is not None:
            model.kill()


def _hear(job: Job, heard: Callable[[], bool]) -> Iterator[Frame]:
    place = 0
    while True:
        with job.changed:
            if place == len(job.spoken) and job.answer is None:
                job.changed.wait(0.5)
            said, answer = job.spoken[place:], job.answer
        yield from said
        place += len(said)
        if answer is not None:
            yield answer
            return
        if not heard():
            return


def _refused(reason: str, text: str) -> Frame:
    return Frame({"event": "refused", "reason": reason, "error": text})
