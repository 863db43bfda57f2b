"""What is changed of Flower's processes on a device, and that Flower still is as it is expected."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli.flwr_clientapp import _parse_args_run_flwr_clientapp
from hypothesis import given
from hypothesis import strategies as st

from fedclient.resident.flower import node_environment
from fedclient.resident.supernode import LONGEST, PATIENCE, SHORTEST, NodeState, Waits, mend
from fedserver.exchange import APP_KILLED


@given(st.lists(st.sampled_from([3.0, 0.5]), min_size=1, max_size=40))
def test_waits_grow_while_idle_and_never_beyond_what_was_asked(asked: list[float]) -> None:
    slept: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", slept.append)
        waits = Waits()
        for seconds in asked:
            waits.sleep(seconds)
    assert all(0 < real <= wish for real, wish in zip(slept, asked, strict=True))
    assert max(slept) <= LONGEST
    for before, wish, real in zip([0.5, *asked], asked, slept, strict=False):
        if wish == 3.0 and before == 0.5:
            assert real == SHORTEST, "soon after a message it looks again soon"
    idle = [real for real, wish in zip(slept, asked, strict=True) if wish == 3.0]
    if 0.5 not in asked:
        assert idle == sorted(idle)


def test_flowers_loop_takes_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's SuperNode must still sleep by its module's ``time``, and count patience by this name."""
    monkeypatch.setattr(start_client_internal, "time", time)
    monkeypatch.setattr(in_memory_corestate, "HEARTBEAT_PATIENCE", 2)
    for name in ("make_simple_http_retry_invoker", "HeartbeatSender", "NodeAuthHttpInterceptor"):
        monkeypatch.setattr(fleet_http_connection, name, vars(fleet_http_connection)[name])
    loop = inspect.getsource(start_client_internal.start_client_internal)
    assert "time.sleep(3)" in loop
    assert "HEARTBEAT_PATIENCE" in inspect.getsource(in_memory_corestate.InMemoryCoreState)
    mend()
    assert isinstance(vars(start_client_internal)["time"], Waits)
    assert start_client_internal.time.monotonic() > 0
    assert vars(in_memory_corestate)["HEARTBEAT_PATIENCE"] == PATIENCE


def test_the_lean_stub_takes_what_flowers_takes(tmp_path: Path) -> None:
    environment = node_environment(tmp_path)
    program = shutil.which("flwr-clientapp", path=environment["PATH"])
    assert program is not None
    assert Path(program).is_relative_to(tmp_path)
    assert Path(environment["FLWR_HOME"]).is_relative_to(tmp_path)
    told = subprocess.run(
        [program, "--help"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    theirs = _parse_args_run_flwr_clientapp()
    for action in theirs._actions:
        for option in action.option_strings:
            assert option in told
    assert os.access(program, os.X_OK)


@pytest.mark.parametrize("fetched", [True, False])
def test_a_stopped_stub_is_answered_for(fetched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it had fetched its message; one that has replied is not."""
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 2)
    monkeypatch.setattr(TaskIdentity, "_task_id", 3)
    state = NodeState(ObjectStoreFactory().store())
    asked = Message(RecordDict(), 2, "train")
    asked.metadata.__dict__["_run_id"] = 7
    asked.metadata.__dict__["_message_id"] = asked.object_id
    state.store_message(asked)
    if fetched:
        state.get_messages_legacy(is_reply=False)
    task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=7, fab_hash="f" * 64)
    assert task is not None
    assert state.claim_task(task)
    assert state.activate_task(task)
    assert state.finish_task(task, SubStatus.FAILED, "Task stopped.")
    (reply,) = state.get_messages_legacy(is_reply=True)
    assert reply.error.code == APP_KILLED
    assert reply.metadata.reply_to_message_id == asked.metadata.message_id
    assert state.get_messages_legacy(is_reply=True) == []
