"""What is changed of Flower's SuperLink, on its real database."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet import node_auth

from fedserver.deployment.superlink import answered, mend, readmission, redeliver

INTERVAL = 30.0


@pytest.fixture
def state(tmp_path: Path) -> SqlLinkState:
    database = str(tmp_path / "superlink.db")
    factory = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database))
    found = factory.state()
    assert isinstance(found, SqlLinkState)
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Flower sets up its database
def test_a_killed_node_is_let_back_once_it_was_away(state: SqlLinkState) -> None:
    node = state.create_node("", "", b"key", INTERVAL)
    assert state.activate_node(node, INTERVAL)
    assert not state.activate_node(node, INTERVAL), "Flower believes it to be there still"
    patient = readmission(SqlLinkState.activate_node, seconds=1e9)
    assert not patient(state, node, INTERVAL)
    # Whoever waits for it sees it away for a while, however soon it asks again.
    assert not patient(state, node, INTERVAL)
    assert state.activate_node(node, INTERVAL)
    prompt = readmission(SqlLinkState.activate_node, seconds=0.0)
    assert not prompt(state, node, INTERVAL)
    assert prompt(state, node, INTERVAL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_killed_superlink_had_claimed_is_handed_out_again(
    state: SqlLinkState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = state.create_node("", "", b"key", INTERVAL)
    state.activate_node(node, INTERVAL)
    run = state.create_run("", "", "", {}, NOOP_FEDERATION_ID, None, "", TaskType.SERVER_APP)
    monkeypatch.setattr(TaskIdentity, "_run_id", run)
    monkeypatch.setattr(TaskIdentity, "_task_id", run)
    monkeypatch.setattr(TaskIdentity, "_node_id", SUPERLINK_NODE_ID)
    lost, confirmed, replied = (_question(state, run, node, number) for number in range(3))
    claimed = [state.get_message_ins(node, 1)[0] for _ in range(3)]
    assert not state.get_message_ins(node, 1), "Flower hands a message out once"
    state.object_store.delete(confirmed)
    store = answered(SqlLinkState.store_message_res)
    assert store(state, _reply(claimed[2]))
    assert list(_replies(state, run, replied)) == [replied]

    # Killed now, with a question and a reply on their way, it is started again.
    assert redeliver(tmp_path / "superlink.db") == 2
    assert [m.metadata.message_id for m in state.get_message_ins(node, 9)] == [lost]
    assert list(_replies(state, run, replied)) == [replied]

    # A node that had got the question after all answers; it is not asked once more.
    redeliver(tmp_path / "superlink.db")
    assert store(state, _reply(claimed[0]))
    assert not state.get_message_ins(node, 9)
    # Nor does a second answer count.
    assert store(state, _reply(claimed[0])) is None
    assert redeliver(tmp_path / "none.db") == 0


def _question(state: SqlLinkState, run: int, node: int, number: int) -> str:
    message = Message(RecordDict({"n": ConfigRecord({"n": number})}), node, "train", ttl=600.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    state.object_store.preregister(run, get_object_tree(message))
    found = state.store_message_ins(message)
    assert found
    return found


def _reply(question: Message) -> Message:
    reply = Message(RecordDict(), reply_to=question)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return reply


def _replies(state: SqlLinkState, run: int, question: str) -> list[str]:
    return [m.metadata.reply_to_message_id for m in state.get_message_res({question}, run)]


def test_flower_still_has_what_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = node_auth.TIMESTAMP_TOLERANCE
    monkeypatch.setattr(node_auth, "TIMESTAMP_TOLERANCE", before)
    monkeypatch.setattr(SqlLinkState, "activate_node", SqlLinkState.activate_node)
    monkeypatch.setattr(SqlLinkState, "store_message_res", SqlLinkState.store_message_res)
    assert "< TIMESTAMP_TOLERANCE" in inspect.getsource(node_auth.authenticate_node)
    mend()
    assert vars(node_auth)["TIMESTAMP_TOLERANCE"] > before
