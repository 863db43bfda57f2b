"""The Server page: what runs and was started here, as tables; of other hosts' processes no numbers."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fedhost.process_identity import process_identity
from fedserver.dashboard import library_views
from fedserver.dashboard.library import Library
from fedserver.dashboard.page import Question

Sign = Callable[[str], str]


def rows(client: TestClient, table: str, query: str = "") -> list[dict[str, str]]:
    answer = client.get(f"/api/v1/server/{table}.csv{query}")
    assert answer.status_code == 200
    return list(csv.DictReader(io.StringIO(answer.text)))


def under_way(folder: Path, **told: Any) -> None:
    live = json.loads((folder / "live.json").read_text())
    here = {"process": process_identity(os.getpid()), "host": socket.gethostname()}
    (folder / "live.json").write_text(json.dumps(live | {"state": "running"} | here | told))


def test_both_tables_of_the_server_are_csv_and_json(
    client: TestClient, sign_in: Sign, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Who looks within one moment is shown what was seen before.
    monkeypatch.setattr("fedserver.dashboard.library.LOOK_SECONDS", 0.0)
    under_way(runs / "mixed")
    sign_in("vera")
    jobs = client.app.state.site.jobs  # type: ignore[attr-defined]
    for run in ("mixed", "mixed-again", "mixed"):
        job = jobs.start("a look", run, ["no such file"], runs, program="json.tool")
        assert job.process.wait()
    told = client.get("/api/v1/server").json()["tables"]
    for name in ("processes", "jobs"):
        found = rows(client, name)
        assert [list(row) for row in found] == [told[name]["columns"]] * told[name]["total"]
        assert client.get("/server").text.count(f"/api/v1/server/{name}.csv") == 1
    assert [row["run"] for row in rows(client, "processes")] == ["mixed"]
    assert [row["run"] for row in rows(client, "jobs")] == ["mixed", "mixed-again", "mixed"]
    assert {row["state"] for row in rows(client, "jobs")} == {"failed"}
    # What the page of a run offers are that run's jobs, and no other's of a like name.
    assert "/api/v1/server/jobs.csv?run=mixed" in client.get("/runs/mixed/control").text
    assert [row["run"] for row in rows(client, "jobs", "?run=mixed")] == ["mixed"] * 2
    assert len(rows(client, "jobs", "?q=again")) == 1
    assert len(rows(client, "processes", "?q=again")) == 1, "it is not searched"


def test_numbers_are_of_this_hosts_very_process(runs: Path) -> None:
    ours = process_identity(os.getpid())
    meters = library_views.Meters()

    def shown() -> dict[str, Any]:
        page = library_views.server(Library(runs), 0, [], meters, Question())
        (row,) = page.tables["processes"].rows
        return dict(row)

    under_way(runs / "mixed")
    row = shown()
    assert row["memory_bytes"] > 0
    assert (row["pid"], row["host"]) == (str(os.getpid()), socket.gethostname())
    # The same number on another host is another process.
    under_way(runs / "mixed", host="gpu-7")
    row = shown()
    assert row["host"] == "gpu-7"
    assert row.get("memory_bytes") is None
    assert row.get("cpu_share") is None
    # So is a later one of that number; its run has been interrupted.
    under_way(runs / "mixed", process=f"{os.getpid()}@1@{ours.rpartition('@')[2]}")
    assert (
        not library_views.server(Library(runs), 0, [], meters, Question()).tables["processes"].rows
    )
    assert meters.read(f"{os.getpid()}@1@") == {"cpu_share": None, "memory_bytes": None}


def test_a_share_is_of_some_time_however_often_one_looks(runs: Path) -> None:
    """Two parts of a page that look within one moment do not make a share of that moment."""
    meters, ours = library_views.Meters(), process_identity(os.getpid())
    found = [meters.read(ours)["cpu_share"] for _ in range(50)]
    assert len(set(found)) <= 2


def test_a_run_that_is_served_alone_offers_no_start(
    client: TestClient, sign_in: Sign, runs: Path
) -> None:
    from fedserver.dashboard.application import make_application

    sign_in("olga")
    assert 'action="/start"' in client.get("/start").text
    alone = make_application(runs / "mixed", client.app.state.site.accounts, hosts=["testserver"])  # type: ignore[attr-defined]
    before = sorted((runs / "mixed").iterdir())
    with TestClient(alone, base_url="https://testserver", follow_redirects=False) as other:
        other.cookies = client.cookies
        page = other.get("/start")
        assert page.status_code == 200
        assert 'action="/start"' not in page.text
        assert f"fedbraid dashboard {runs}" in page.text
        csrf = sign_in("olga")
        other.cookies = client.cookies
        form = {"csrf": csrf, "scenario": "quickstart", "name": "again", "reason": "to try it"}
        answer = other.post("/start", data=form)
        assert answer.status_code == 409
        assert f"fedbraid dashboard {runs}" in answer.text
        assert other.get("/").headers["location"] == "/runs/mixed"
    assert sorted((runs / "mixed").iterdir()) == before
