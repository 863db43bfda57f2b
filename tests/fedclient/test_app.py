"""The Flower ClientApp: one bytes object in and one out, expected failures as a line of text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from aggregators import GateContext, Layout, UpdateRejected, Verdict, admit
from aggregators.messages import Capabilities, Plan, encode_plan
from aggregators.view import View
from fedclient.answers import answers_of
from fedclient.app import make_app, settings_of
from fedclient.base_model import BaseModelError, LoadedModel
from fedclient.data import DataError
from fedclient.node import NodeSettings
from fedclient.worker import NodeError, Worker
from fedhost.payloads import RECORD


@pytest.fixture(autouse=True)
def _a_flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are made in the name of a task; in a SuperNode's process, that is Flower's."""
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 2)
    monkeypatch.setattr(TaskIdentity, "_task_id", 3)


def asked(
    kind: str, payload: bytes, worker: Worker | None = None, **node_config: Any
) -> ConfigRecord:
    """The record with which a ClientApp, called as Flower calls it, replies."""
    settings = {"partition-id": 0} | node_config
    context = Context(run_id=1, node_id=2, node_config=settings, state=RecordDict(), run_config={})
    content = RecordDict({RECORD: ConfigRecord({"payload": payload})})
    message = Message(content, dst_node_id=2, message_type=kind)
    reply = make_app(answers_of(worker or Worker()))(message, context)
    assert not reply.has_error()
    record = reply.content[RECORD]
    assert isinstance(record, ConfigRecord)
    return record


def test_a_query_is_answered(tiny: LoadedModel, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    query = {
        "base_model": str(tiny.path),
        "dtype": "float32",
        "threads": 1,
        "data": plan.data,
        "names": ["first", "second"],
    }
    record = asked("query", json.dumps(query).encode(), **{"partition-id": 1})
    payload = record["payload"]
    assert isinstance(payload, bytes)
    found = Capabilities.from_bytes(payload)
    assert (found.node, found.base_digest) == ("second", tiny.digest)
    assert "error" not in record


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_plan_is_answered(kind: str, tiny: LoadedModel, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(action=kind)
    record = asked(kind, encode_plan(plan, View(), None))
    payload, seconds = record["payload"], record["seconds"]
    assert isinstance(payload, bytes)
    assert isinstance(seconds, float)
    assert seconds >= 0
    admitted = admit(payload, GateContext(Layout.from_model(tiny.model), plan))
    assert (admitted.update is not None) == (kind == "train")
    # The same work through the worker alone: the transport adds nothing to the bytes.
    assert payload == Worker().work(encode_plan(plan, View(), None), NodeSettings(index=0))


class Failing(Worker):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def work(self, payload: bytes, settings: NodeSettings) -> bytes:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        BaseModelError("no model"),
        DataError("x.jsonl:3: no object"),
        NodeError("not me"),
        UpdateRejected(Verdict.MALFORMED, "no plan"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_expected_failures_travel_as_text(error: Exception, kind: str) -> None:
    record = asked(kind, b"", Failing(error))
    assert record["error"] == str(error)
    assert "payload" not in record


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        asked("train", b"", Failing(ZeroDivisionError()))


def test_real_failures_travel_as_text(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    failures = {
        "f" * 12: make_plan(base_digest="f" * 64),
        "layout": make_plan(layout="e" * 64),
        "no such folder": make_plan(base_model="/nowhere/at/all"),
        "no such file": make_plan(data={"source": str(tmp_path / "none.jsonl")}),
        "did you mean 'category'": make_plan(data={**(make_plan().data or {}), "key": "categroy"}),
    }
    for said, plan in failures.items():
        text = asked("train", encode_plan(plan, View(), None))["error"]
        assert isinstance(text, str)
        assert said in text
        assert "Traceback" not in text
    assert isinstance(asked("train", b"not a plan")["error"], str)
    query = {"base_model": "/nowhere/at/all", "dtype": "float32", "threads": 1, "data": None}
    assert "no such folder" in str(asked("query", json.dumps(query).encode())["error"])


def test_a_nodes_settings() -> None:
    def read(**node_config: Any) -> NodeSettings:
        return settings_of(
            Context(run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config={})
        )

    assert read() == NodeSettings()
    assert read(**{"partition-id": 3, "rank-limit": 8, "name": "a", "data": "b"}) == NodeSettings(
        index=3, rank_limit=8, name="a", data="b"
    )
