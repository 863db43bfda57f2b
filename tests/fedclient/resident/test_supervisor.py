"""One answer to one question, whatever happens to callers, the model's process or the supervisor.

The processes are real: each loads torch and the tiny model.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aggregators.messages import Capabilities, Plan, encode_plan
from aggregators.view import View
from fedclient.node import NodeSettings, Refused
from fedclient.resident.connection import Connection
from fedclient.resident.question import Question
from fedclient.resident.settings import NICE, ResidentSettings
from fedclient.resident.supervisor import Supervisor
from fedclient.worker import Worker

MEMORY = 8 << 30
LONG = 100_000  # local steps: more than any test waits for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resident")


@pytest.fixture(scope="module")
def supervisor(folder: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(ResidentSettings(folder, cpus=1, memory_bytes=MEMORY))
    yield supervisor
    supervisor.close()


def question(plan: Plan) -> Question:
    return Question(plan.action, encode_plan(plan, View(), None), NodeSettings(index=0))


def answer(supervisor: Supervisor, asked: Question) -> tuple[dict[str, Any], bytes]:
    *_, (header, payload) = supervisor.ask(asked, lambda: True)
    return header, payload


def test_the_bytes_are_the_workers_and_are_given_again(
    supervisor: Supervisor, make_plan: Callable[..., Plan], folder: Path
) -> None:
    asked = question(make_plan(local_steps=2, nonce="1" * 32))
    heard = [frame.header["event"] for frame in supervisor.ask(asked, lambda: True)]
    assert heard == ["progress", "progress", "reply"]
    header, payload = answer(supervisor, asked)
    assert header["stored"]
    grown, most, accelerator = header["memory"]
    # The process holds at least torch; what was measured is kept with the answer.
    assert most > 100 << 20
    assert 0 <= grown < most
    assert accelerator == 0 or torch.cuda.is_available()
    assert payload == Worker().work(asked.payload, asked.settings)
    assert answer(supervisor, replace(asked, settings=NodeSettings(index=1)))[1] != payload


def test_the_models_process_is_bounded(supervisor: Supervisor) -> None:
    pid = supervisor.health()["model_pid"]
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (data,) = [line.split() for line in limits if line.startswith("Max data size")]
    assert data[3:5] == [str(MEMORY), str(MEMORY)]
    assert len(os.sched_getaffinity(pid)) == 1
    assert os.getpriority(os.PRIO_PROCESS, pid) - os.getpriority(os.PRIO_PROCESS, 0) == NICE


def test_callers_of_one_question_share_its_work(
    supervisor: Supervisor, make_plan: Callable[..., Plan]
) -> None:
    asked = question(make_plan(local_steps=5, nonce="2" * 32))
    first = supervisor.ask(asked, lambda: True)
    assert next(first).header["step"] == 1
    gone = supervisor.ask(asked, lambda: False)
    next(gone)
    gone.close()
    # The second hears from the beginning what is said to the first: it is the same work.
    steps = [f.header.get("step") for f in supervisor.ask(asked, lambda: True)]
    assert steps == [1, 2, 3, 4, 5, None]
    assert [f.header.get("step") for f in first] == [2, 3, 4, 5, None]


def test_a_killed_process_costs_time_and_nothing_else(
    supervisor: Supervisor, make_plan: Callable[..., Plan]
) -> None:
    asked = question(make_plan(local_steps=3, nonce="3" * 32))
    before = supervisor.health()
    frames = supervisor.ask(asked, lambda: True)
    assert next(frames).header["event"] == "progress"
    os.kill(before["model_pid"], signal.SIGKILL)
    *_, last = frames
    assert last.payload == Worker().work(asked.payload, asked.settings)


def test_work_ends_at_its_deadline_or_when_it_is_cancelled(
    supervisor: Supervisor, make_plan: Callable[..., Plan]
) -> None:
    endless = make_plan(local_steps=LONG, nonce="4" * 32, deadline_seconds=1.0)
    before = supervisor.health()["starts"]
    header, _ = answer(supervisor, question(endless))
    assert header["reason"] == "deadline"
    endless = make_plan(local_steps=LONG, nonce="5" * 32, deadline_seconds=600.0)
    frames = supervisor.ask(question(endless), lambda: True)
    next(frames)
    assert supervisor.cancel("6" * 32) == 0
    assert supervisor.cancel("5" * 32) == 1
    *_, last = frames
    assert last.header["reason"] == "cancelled"
    # Training stops between two steps, and the process keeps its model.
    assert supervisor.health()["starts"] == before


def test_a_process_that_hangs_is_replaced_at_the_deadline(
    supervisor: Supervisor, make_plan: Callable[..., Plan]
) -> None:
    asked = question(make_plan(local_steps=LONG, nonce="9" * 32, deadline_seconds=2.0))
    frames = supervisor.ask(asked, lambda: True)
    next(frames)
    os.kill(supervisor.health()["model_pid"], signal.SIGSTOP)
    *_, last = frames
    assert last.header["reason"] == "deadline"
    header, _ = answer(supervisor, question(make_plan(local_steps=1, nonce="a" * 32)))
    assert header["event"] == "reply"


def test_work_that_nobody_waits_for_gives_way(
    supervisor: Supervisor, make_plan: Callable[..., Plan]
) -> None:
    left = supervisor.ask(
        question(make_plan(local_steps=LONG, nonce="7" * 32, deadline_seconds=600.0)), lambda: True
    )
    next(left)
    left.close()
    header, _ = answer(supervisor, question(make_plan(local_steps=1, nonce="8" * 32)))
    assert header["event"] == "reply"


def test_expected_failures_and_defects_are_told_apart(
    supervisor: Supervisor, make_plan: Callable[..., Plan]
) -> None:
    header, _ = answer(supervisor, question(make_plan(base_digest="f" * 64)))
    assert header["reason"] == "node"
    header, _ = answer(supervisor, Question("query", b"{}", NodeSettings(index=0)))
    assert header["event"] == "defect"


def test_a_device_that_is_in_use_does_not_work(
    make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    in_use = tmp_path / "in-use"
    in_use.touch()
    settings = ResidentSettings(tmp_path / "worker", pause_command=f"test -e {in_use}")
    supervisor = Supervisor(settings)
    try:
        header, _ = answer(supervisor, question(make_plan(deadline_seconds=0.5)))
        assert header["reason"] == "paused"
        assert supervisor.health()["state"] == "paused"
    finally:
        supervisor.close()


def test_the_socket_is_the_owners_and_survives_its_server(
    make_plan: Callable[..., Plan], tmp_path: Path, tiny_model_folder: Path
) -> None:
    settings = ResidentSettings(tmp_path / "worker")
    plan = make_plan(local_steps=2, deadline_seconds=600.0)
    asked = question(plan)
    query = {
        "base_model": str(tiny_model_folder),
        "dtype": "float32",
        "threads": 1,
        "data": plan.data,
        "names": ["first"],
    }
    first = subprocess.Popen(settings.command(), stdout=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()
    assert settings.folder.stat().st_mode & 0o777 == 0o700
    assert settings.socket.stat().st_mode & 0o777 == 0o600
    again: list[subprocess.Popen[bytes]] = []

    def kill_and_restart(progress: dict[str, object]) -> None:
        if not again:
            first.kill()
            first.wait()
            again.append(subprocess.Popen(settings.command(), stdout=subprocess.PIPE))

    try:
        import json

        with Connection(settings.socket) as connection:
            told = connection.answer("query", json.dumps(query).encode(), NodeSettings(index=0))
            assert Capabilities.from_bytes(told.payload).node == "first"
            reply = connection.answer("train", asked.payload, asked.settings, kill_and_restart)
            assert reply.payload == Worker().work(asked.payload, asked.settings)
        second = subprocess.run(settings.command(), capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert second.stderr.startswith("error: ")
    finally:
        for process in [first, *again]:
            process.send_signal(signal.SIGTERM)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    assert not settings.socket.exists()
    with Connection(settings.socket, patience=0.2) as connection, pytest.raises(Refused) as refusal:
        connection.answer("train", asked.payload, asked.settings)
    assert refusal.value.reason == "unreachable"


def test_the_stub_imports_no_heavy_room() -> None:
    """What Flower's process for every message imports: the ClientApp and the way to the worker."""
    program = (
        "import sys, fedclient.app, fedclient.resident.connection\n"
        "heavy = {'torch', 'transformers', 'peft', 'aggregators', 'fedkernels', 'fedserver'}\n"
        "print(*heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"
