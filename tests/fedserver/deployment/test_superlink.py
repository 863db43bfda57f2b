"""What is changed of Flower's SuperLink, on its real database."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet import node_auth

from fedserver.deployment.superlink import mend, readmission

INTERVAL = 30.0


@pytest.fixture
def state(tmp_path: Path) -> SqlLinkState:
    factory = LinkStateFactory(
        str(tmp_path / "superlink.db"), NoOpFederationManager(), ObjectStoreFactory()
    )
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


def test_flower_still_has_what_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = node_auth.TIMESTAMP_TOLERANCE
    monkeypatch.setattr(node_auth, "TIMESTAMP_TOLERANCE", before)
    monkeypatch.setattr(SqlLinkState, "activate_node", SqlLinkState.activate_node)
    assert "< TIMESTAMP_TOLERANCE" in inspect.getsource(node_auth.authenticate_node)
    mend()
    assert vars(node_auth)["TIMESTAMP_TOLERANCE"] > before
