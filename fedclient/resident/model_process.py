"""The process that holds base model and data: reads questions from a socket, writes answers to it.

It is started and watched by ``supervisor``, one question at a time. Training is cancelled between two
steps; whatever does not stop then is killed and replaced.
"""

from __future__ import annotations

import argparse
import os
import queue
import resource
import socket
import threading
from collections.abc import Sequence

from fedclient.allocator import give_back_large_blocks
from fedclient.node import Answer, Refused
from fedclient.resident import frames
from fedclient.resident.frames import Frame
from fedclient.resident.question import Question

MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory")
ORPHANED = 3  # exit status of a process whose supervisor is gone


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the socket whose descriptor is given until the other side closes it."""
    parser = argparse.ArgumentParser(prog="python -m fedclient.resident.model_process")
    parser.add_argument("--descriptor", type=int, required=True)
    parser.add_argument("--memory-bytes", type=int)
    parser.add_argument("--cpus", type=int)
    parser.add_argument("--nice", type=int, default=0)
    given = parser.parse_args(arguments)
    limit(given.memory_bytes, given.cpus, given.nice)
    give_back_large_blocks()
    serve(socket.socket(fileno=given.descriptor))


def limit(memory_bytes: int | None, cpus: int | None, nice: int) -> None:
    """Bound this process: private memory, cores where the system can, and priority."""
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    if cpus is not None and hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[-cpus:])
    if nice:
        os.nice(nice)


def serve(connection: socket.socket) -> None:
    """Answer questions one by one; between two steps of training one may be cancelled."""
    from fedclient.answers import answers_of
    from fedclient.worker import Worker

    heard = _Heard()
    number = 0

    def tell(node: str, step: int, steps: int, loss: float) -> None:
        if heard.cancelled == number:
            raise Refused("cancelled", "cancelled")
        progress = {"event": "progress", "node": node, "step": step, "steps": steps, "loss": loss}
        frames.send(connection, Frame(progress))

    answer = answers_of(Worker(tell))
    threading.Thread(target=_listen, args=(connection, heard), daemon=True).start()
    frames.send(connection, Frame({"event": "ready"}))
    while True:
        asked = heard.questions.get()
        number = asked.header["number"]
        frames.send(connection, _answered(answer, Question.from_frame(asked)))


class _Heard:
    """What the supervisor has said: questions, and the number of the last one that it cancelled."""

    def __init__(self) -> None:
        self.questions: queue.Queue[Frame] = queue.Queue()
        self.cancelled = -1


def _answered(answer: Answer, question: Question) -> Frame:
    from fedclient.memory import PeakMemory

    memory = PeakMemory()
    try:
        payload = answer(question.kind, question.payload, question.settings)
        return Frame({"event": "reply", "memory": memory.read().told()}, payload)
    except Refused as refusal:
        return Frame({"event": "refused", "reason": refusal.reason, "error": str(refusal)})
    except MemoryError:
        return _no_memory()
    except RuntimeError as error:
        if any(words in str(error).lower() for words in MEMORY_WORDS):
            return _no_memory()
        return _defect(error)
    except Exception as error:
        return _defect(error)


def _no_memory() -> Frame:
    text = "memory: the work needs more than this device allows; plan smaller batches or ranks"
    return Frame({"event": "refused", "reason": "memory", "error": text, "spent": True})


def _defect(error: Exception) -> Frame:
    import traceback

    traceback.print_exc()
    return Frame({"event": "defect", "error": f"{type(error).__name__}: {error}"})


def _listen(connection: socket.socket, heard: _Heard) -> None:
    """Hear questions, and the end of the supervisor even while the main thread works."""
    try:
        while True:
            frame = frames.receive(connection)
            if "cancel" in frame.header:
                heard.cancelled = frame.header["cancel"]
            else:
                heard.questions.put(frame)
    except (EOFError, OSError):
        os._exit(ORPHANED)


if __name__ == "__main__":
    main()
