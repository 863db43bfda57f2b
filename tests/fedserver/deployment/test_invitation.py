"""Whom an operator may invite, and for how long."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhost.enrolment import EnrolmentRefused
from fedhost.node_names import is_node_name
from fedserver.configuration import ConfigurationError, parse
from fedserver.deployment.folder import ServerFolder
from fedserver.deployment.invitation import invite

NAMES = st.text(st.sampled_from("aZ09 ._-/\n\tä"), max_size=70) | st.text(max_size=5)


@given(NAMES)
def test_a_name_that_can_be_invited_is_one_that_a_scenario_can_have(name: str) -> None:
    try:
        parse({"nodes": [{"name": name}]})
        possible = True
    except ConfigurationError:
        possible = False
    assert is_node_name(name) == possible


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> ServerFolder:
    folder = ServerFolder(tmp_path_factory.mktemp("server"))
    folder.prepare({})
    return folder


@pytest.mark.parametrize("name", ["", "../x", "two\nlines", "end\n", "x" * 500, " x", "-x"])
def test_no_other_name_is_invited(name: str, server: ServerFolder) -> None:
    with pytest.raises(EnrolmentRefused) as refusal:
        invite(server, name, 24.0)
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 250


@pytest.mark.parametrize("hours", [0.0, -1.0, 1e9, math.nan, math.inf])
def test_a_token_that_nobody_could_use_is_not_made(hours: float, server: ServerFolder) -> None:
    with pytest.raises(EnrolmentRefused, match="--hours"):
        invite(server, "clinic", hours)
    assert invite(server, "clinic", 0.5).name == "clinic"
