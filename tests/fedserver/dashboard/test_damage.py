"""Whatever a run's files hold in any field: every page is a page, and its JSON is JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from fedhost.process_identity import process_identity
from fedserver.dashboard.accounts import Accounts
from fedserver.dashboard.application import live_payload, make_application
from fedserver.dashboard.guard import COOKIE
from fedserver.dashboard.registry import VIEWS
from fedserver.dashboard.streams import _event

FILES = ("live.json", "events.jsonl", "metrics.jsonl")
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.sampled_from(
        [1e300, -1e18, float("nan"), float("inf"), "<b>", "", "9" * 30, "\ud800", 0, -1]
    )
    | st.text(st.characters(codec=None), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["node", "round", "loss", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)
CHANGES = st.lists(st.tuples(st.integers(0, 999), VALUES | st.just(...)), min_size=1, max_size=4)


def damaged(line: str, changes: list[tuple[int, Any]]) -> str:
    """An object with other values in some of its fields, or of its nodes'; ... takes one away."""
    told = json.loads(line)
    for place, value in changes:
        target = told
        nodes = told.get("nodes")
        if isinstance(nodes, list) and nodes and place % 2 and isinstance(nodes[0], dict):
            target = nodes[0]
        if not target:
            continue
        key = sorted(target)[place // 2 % len(target)]
        if value is ...:
            del target[key]
        else:
            target[key] = value
    return json.dumps(told)


class Damaged:
    """A run under way, and what its files held at first."""

    def __init__(self, folder: Path, client: TestClient) -> None:
        live = json.loads((folder / "live.json").read_text())
        live |= {"state": "running", "phase": "train", "host": socket.gethostname()}
        live |= {"process": process_identity(os.getpid()), "deadline_seconds": 9.0, "quorum": 1}
        (folder / "live.json").write_text(json.dumps(live))
        self.folder, self.client = folder, client
        self.sound = {name: (folder / name).read_text() for name in FILES}

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        self.client.app.state.site.library._looked = -1.0  # type: ignore[attr-defined]

    def look(self) -> None:
        addresses = ["/", "/server", "/compare?run=mixed", "/runs/mixed/rounds/2"]
        addresses += [f"/runs/mixed/{view.name}".rstrip("/") for view in VIEWS]
        for address in addresses:
            page = self.client.get(address, headers={"accept": "text/html"})
            assert page.status_code == 200, (address, page.text[-300:])
            assert "<b>" not in page.text
        twins = ["/runs", "/server", "/compare?run=mixed", "/runs/mixed/log/log.csv"]
        twins += [f"/runs/mixed/{view.name or 'live'}" for view in VIEWS]
        for address in twins:
            answer = self.client.get(f"/api/v1{address}")
            assert answer.status_code == 200, (address, answer.text[-300:])
            if not address.endswith(".csv"):
                json.loads(answer.content, parse_constant=pytest.fail)
        run = self.client.app.state.site.library.reader("mixed")  # type: ignore[attr-defined]
        _event(1, live_payload(run))


@pytest.fixture(scope="module")
def damage(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Damaged]:
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(finished_run, root / "mixed")
    accounts = Accounts(root)
    application = make_application(root, accounts, hosts=["testserver"])
    with TestClient(application, base_url="https://testserver") as client:
        client.cookies.set(COOKIE, accounts.open_session("olga", "operator"))
        yield Damaged(root / "mixed", client)


@settings(max_examples=15, deadline=None)
@given(CHANGES)
def test_a_live_file_may_say_anything(damage: Damaged, changes: list[tuple[int, Any]]) -> None:
    damage.write("live.json", damaged(damage.sound["live.json"], changes))
    damage.look()
    damage.write("live.json", damage.sound["live.json"])


@settings(max_examples=15, deadline=None)
@given(CHANGES)
def test_a_line_of_metrics_may_say_anything(
    damage: Damaged, changes: list[tuple[int, Any]]
) -> None:
    *lines, last = damage.sound["metrics.jsonl"].splitlines()
    damage.write("metrics.jsonl", "\n".join([*lines, damaged(last, changes)]) + "\n")
    damage.look()
    damage.write("metrics.jsonl", damage.sound["metrics.jsonl"])


@settings(max_examples=15, deadline=None)
@given(CHANGES)
def test_a_line_of_the_log_may_say_anything(
    damage: Damaged, changes: list[tuple[int, Any]]
) -> None:
    """Every kind of event at once, and one that nobody knows."""
    lines = damage.sound["events.jsonl"].splitlines()
    kinds = {json.loads(line)["event"]: line for line in lines}
    wrong = [damaged(line, changes) for line in [*kinds.values(), *kinds.values()]]
    wrong += [damaged('{"time": 1.0, "event": "new", "node": "a", "level": "info"}', changes)]
    wrong += ["[1]", "7", "{", "[" * 100_000]
    damage.write("events.jsonl", "\n".join([wrong[0], *lines, *wrong]) + "\n")
    live = json.loads(damage.sound["live.json"]) | {"run_offset": 0, "round_offset": 0}
    damage.write("live.json", json.dumps(live | {"started": changes[0][0]}))
    damage.look()
    for name in ("events.jsonl", "live.json"):
        damage.write(name, damage.sound[name])


@pytest.mark.parametrize("stamp", ["<b>", 1e300, float("nan"), -1e18, None, 10**400, ...])
def test_the_log_shows_a_line_of_no_date(damage: Damaged, stamp: Any) -> None:
    line = {"time": stamp, "event": "notice", "level": "info", "text": "what it said"}
    if stamp is ...:
        del line["time"]
    damage.write("events.jsonl", damage.sound["events.jsonl"] + json.dumps(line) + "\n")
    page = damage.client.get("/runs/mixed/log").text
    row = re.search(r"<tbody>\s*<tr>(.*?)</tr>", page, re.DOTALL)
    assert row is not None
    if stamp != 10**400:
        assert "what it said" in row[1]
        assert "<time" not in row[1]
    rows = damage.client.get("/api/v1/runs/mixed/log").json()["tables"]["log"]["rows"]
    assert all(row["time"] is None or row["time"] > 0 for row in rows)
    damage.write("events.jsonl", damage.sound["events.jsonl"])
