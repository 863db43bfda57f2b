"""What is said of nodes that are kept out, of roll-backs, of jobs, and of runs without a summary."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from fedserver import events, metrics
from fedserver.control import EXCLUDING, OPERATOR
from fedserver.dashboard.jobs import in_words
from fedserver.dashboard.library import Library
from fedserver.dashboard.node_views import fleet
from fedserver.dashboard.page import Question
from fedserver.dashboard.round_views import live
from fedserver.dashboard.run_reader import RunReader
from fedserver.dashboard.standings import rollbacks, standings
from fedserver.ledger import Ledger
from fedserver.live_log import LiveLog

SCALARS = st.one_of(
    st.integers(-(10**6), 10**6), st.booleans(), st.text(st.characters(codec="ascii"), min_size=1)
)


def test_who_is_kept_out_is_nobody_who_is_waited_for(runs: Path) -> None:
    """Before round 4 three nodes are kept out and one of them comes back; the run goes back twice."""
    folder = runs / "mixed"
    ledger = Ledger(folder, write=True)
    acted: list[tuple[str, dict[str, object]]] = [
        ("drain", {"node": "school"}),
        ("quarantine", {"node": "office"}),
        ("revoke", {"node": "phone"}),
        ("readmit", {"node": "school"}),
        ("rollback", {"round": 1}),
        ("rollback", {"round": 0}),
    ]
    for action, arguments in acted:
        ledger.append(OPERATOR, 4, {"action": action, "arguments": arguments}, {"applied": 0.0})
    ledger.close()
    run = RunReader(folder, "mixed")
    assert standings(run) == {"office": "quarantined", "phone": "revoked"}
    assert rollbacks(run) == [[4, 1], [4, 0]]
    with (folder / "events.jsonl").open("a") as log:
        log.write(json.dumps({"time": 0.0, "event": "round_started", "round": 4}) + "\n")
    page = live(run, Question())
    shown = {row["node"]: row["status"] for row in page.tables["arrivals"].rows}
    assert (shown["office"], shown["phone"], shown["school"]) == (
        "quarantined",
        "revoked",
        "waiting",
    )
    assert sum(page.data["arrivals"].get(how, 0) for how in EXCLUDING.values()) == 2
    assert page.data["rollbacks"] == [[4, 1], [4, 0]]


def test_a_run_without_a_summary_shows_the_newest_losses_of_its_ledger(runs: Path) -> None:
    folder = runs / "mixed"
    ledger = Ledger(folder)
    known = metrics.evaluations(ledger)
    ledger.close()
    (folder / "summary.json").unlink()
    row = Library(runs).rows()[0]
    before, after = known[0], known[max(known)]
    assert before is not None
    assert after is not None
    assert row["loss_before"] == pytest.approx(before["loss"])
    assert row["loss_after"] == pytest.approx(after["loss"])
    (folder / "metrics.jsonl").write_text("")
    assert Library(runs).rows()[0]["loss_after"] is None


def test_the_fleet_shows_the_memory_of_accelerators_that_nodes_tell_of(tmp_path: Path) -> None:
    nodes = (
        events.NodeInfo("lab", "rank 8", 10, 2, memory_bytes=64, accelerator_memory_bytes=24),
        events.NodeInfo("phone", "rank 2", 10, 2, memory_bytes=8),
    )
    log = LiveLog(tmp_path, lambda event: None)
    log(events.RunStarted("tiny", "braid", 2, 1, nodes, "model", str(tmp_path)))
    log(events.RoundsEnded("finished"))
    table = fleet(RunReader(tmp_path, "tiny"), Question()).tables["fleet"]
    shown = {
        row["node"]: (row["memory_bytes"], row["accelerator_memory_bytes"]) for row in table.rows
    }
    assert shown == {"lab": (64, 24), "phone": (8, None)}
    assert {"RAM", "VRAM"} <= {column.title for column in table.columns}


def test_the_pages_of_the_log_are_its_lines_once_each(client: TestClient, sign_in: object) -> None:
    assert callable(sign_in)
    sign_in("vera")
    whole = list(csv.DictReader(io.StringIO(client.get("/api/v1/runs/mixed/log/log.csv").text)))
    found: list[dict[str, object]] = []
    pages, number = 1, 0
    while number < pages:
        number += 1
        table = client.get(f"/api/v1/runs/mixed/log?page={number}").json()["tables"]["log"]
        pages = table["pages"]
        found += table["rows"]
    assert [row["text"] for row in found] == [row["text"] for row in whole]
    assert pages == -(-len(whole) // 40) > 1
    words = client.get("/runs/mixed/log?q=round_committed").text
    assert words.count('data-label="Event"') == 3


@given(st.dictionaries(st.from_regex("[a-z_]{1,9}", fullmatch=True), SCALARS, max_size=4))
def test_a_programs_json_line_is_told_in_words(values: dict[str, object]) -> None:
    line = json.dumps({"event": "round_committed", "nodes": [{"node": "a"}]} | values)
    told = in_words(line)
    assert told == line[:300] or not told.startswith("{")
    assert "[{" not in told
    assert in_words("error: no such model") == "error: no such model"


def test_a_run_of_devices_is_not_continued_as_a_simulation(
    client: TestClient, sign_in: Callable[[str], str], runs: Path
) -> None:
    live = runs / "mixed" / "live.json"
    csrf = sign_in("olga")
    for real, offered, word in ((True, False, "fedbraid server run"), (False, True, "say why")):
        told = json.loads(live.read_text()) | {"state": "stopped", "real_time": real}
        live.write_text(json.dumps(told))
        page = client.get("/api/v1/runs/mixed/control").json()
        assert ("continue" in page["offered"]) is offered
        assert ("server run" in page["continued_elsewhere"]) is real
        answer = client.post("/runs/mixed/actions/continue", data={"csrf": csrf, "reason": ""})
        assert answer.status_code == 409
        assert word in answer.text


def test_a_chain_that_is_broken_later_is_seen_by_a_dashboard_that_runs(
    client: TestClient, sign_in: Callable[[str], str], runs: Path
) -> None:
    sign_in("vera")
    assert client.get("/api/v1/runs/mixed/ledger").json()["linked"] is True
    with closing(sqlite3.connect(runs / "mixed" / "ledger.db")) as database, database:
        database.execute("UPDATE entries SET previous = ? WHERE height = 2", ("0" * 64,))
    assert client.get("/api/v1/runs/mixed/ledger").json()["linked"] is False
