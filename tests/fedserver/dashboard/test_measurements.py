"""Distances measured from the dashboard: the ledger's updates, an operator's wish, nothing written."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fedserver import events
from fedserver.configuration import RunConfiguration
from fedserver.dashboard.jobs import JobError
from fedserver.distances import measure
from fedserver.ledger import Ledger
from fedserver.replay import accepted_updates
from fedserver.run_folder import recorded_configuration

ASK, ROBUSTNESS = "/runs/loud/robustness/measure", "/api/v1/runs/loud/robustness"
NODES = (
    *({"name": name} for name in ("clinic", "helpdesk", "office")),
    {"name": "loud", "learning_rate": 2e-2},
    *({"name": name, "strand": "projected"} for name in ("school", "cafe")),
    *({"name": name, "strand": "zeroth-order"} for name in ("phone", "tablet")),
)


@pytest.fixture(scope="module")
def outlying_run(
    make_configuration: Callable[..., RunConfiguration], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from simulations.run import simulate

    folder = tmp_path_factory.mktemp("outlying") / "loud"
    settings = make_configuration(
        name="loud",
        nodes=NODES,
        evaluate=False,
        contributions=False,
        signatures="required",
        zeroth_order={"estimator": "hybrid", "learning_rate": 1e-3, "pool_size": 64},
    )
    simulate(settings, folder, _silent, samples=0)
    return folder


@pytest.fixture
def loud(outlying_run: Path, runs: Path) -> Path:
    """The run, to be acted on, beside the other one."""
    return shutil.copytree(outlying_run, runs / "loud")


def wait(client: TestClient) -> None:
    for one in client.app.state.site.measurements._found.values():  # type: ignore[attr-defined]
        one.job.process.wait()


def measured(client: TestClient, csrf: str, number: int) -> dict[str, Any]:
    answer = client.post(ASK, data={"csrf": csrf, "round": str(number)})
    assert answer.status_code == 303
    wait(client)
    found: dict[str, Any] = client.get(f"/api/v1{answer.headers['location']}").json()
    return found


def test_the_page_has_the_ledgers_distances_and_says_of_which_round(
    loud: Path, client: TestClient, sign_in: Callable[[str], str]
) -> None:
    csrf = sign_in("olga")
    database = sqlite3.connect(loud / "ledger.db")
    before = database.execute("SELECT COUNT(*) FROM entries").fetchone()
    page = client.get("/runs/loud/robustness", headers={"accept": "text/html"}).text
    assert "No distances were measured" in page
    told = client.get(ROBUSTNESS).json()
    assert told["measurement"]["state"] == "not asked"
    assert "distance" not in told["tables"]["influence"]["columns"]

    told = measured(client, csrf, 2)
    ledger = Ledger(loud)
    entry, expected = measure(ledger, recorded_configuration(ledger), 2)
    ledger.close()
    wanted = {
        (one.node, one.family.replace("_", " ")): (one.distance, one.over_median, one.cosine)
        for one in expected
    }
    assert told["measurement"]["state"] == "finished"
    assert (told["measurement"]["round"], told["measurement"]["entry"]) == (2, entry.hash)
    shown = {
        (row["node"], row["family"]): (row["distance"], row["over_median"], row["cosine"])
        for row in told["tables"]["influence"]["rows"]
        if row["distance"] is not None
    }
    assert shown.keys() == wanted.keys()
    for key, values in wanted.items():
        assert shown[key] == pytest.approx(values)
    # A hybrid node is in two families; its row of the last round is of neither alone.
    assert {family for node, family in shown if node == "phone"} == {"low rank", "seed scalars"}
    rows = client.get(ROBUSTNESS + "?sort=-over_median").json()["tables"]["influence"]["rows"]
    assert rows[0]["node"] == "loud"
    assert rows[0]["over_median"] > 2 * rows[1]["over_median"]
    text = client.get(ROBUSTNESS + "/influence.csv").text
    assert len(list(csv.DictReader(io.StringIO(text)))) == len(rows)

    own = client.get("/api/v1/runs/loud/rounds/2/distances").json()
    assert {r["node"] for r in own["tables"]["distances"]["rows"]} == {one.node for one in expected}
    text = client.get("/api/v1/runs/loud/rounds/2/distances/distances.csv").text
    for row, one in zip(csv.DictReader(io.StringIO(text)), expected, strict=True):
        assert row["node"] == one.node
        assert float(row["norm"]) == pytest.approx(one.norm)
    client.cookies.clear()
    sign_in("vera")
    page = client.get("/runs/loud/robustness", headers={"accept": "text/html"}).text
    assert "Distance against its family&#39;s median, round 2" in page
    assert ASK not in page
    assert database.execute("SELECT COUNT(*) FROM entries").fetchone() == before
    database.close()


def test_a_round_is_measured_once_and_one_at_a_time(
    loud: Path, client: TestClient, sign_in: Callable[[str], str]
) -> None:
    csrf = sign_in("olga")
    site = client.app.state.site  # type: ignore[attr-defined]
    run = site.library.reader("loud")
    for _ in range(2):
        site.measurements.start(run, 1)
    (one,) = site.measurements._found.values()
    os.kill(one.job.process.pid, signal.SIGSTOP)
    assert client.get(ROBUSTNESS).json()["measurement"]["state"] == "working"
    with pytest.raises(JobError, match="round 1 is being measured"):
        site.measurements.start(run, 3)
    answer = client.post(ASK, data={"csrf": csrf, "round": "3"}, headers={"accept": "text/html"})
    assert answer.status_code == 409
    assert "round 1 is being measured" in answer.text
    os.kill(one.job.process.pid, signal.SIGCONT)
    wait(client)
    assert measured(client, csrf, 1)["measurement"]["state"] == "finished"
    assert len(site.jobs.json("loud")) == 1
    # What was measured is forgotten with the job's output, and can be asked for again.
    one.job.log.unlink()
    assert client.get(ROBUSTNESS).json()["measurement"]["state"] == "not asked"
    assert measured(client, csrf, 1)["measurement"]["state"] == "finished"
    # Another run under that name is another run, and what was measured is not of it.
    database = sqlite3.connect(loud / "ledger.db")
    database.execute("UPDATE entries SET hash = printf('%064d', height)")
    database.commit()
    database.close()
    assert client.get(ROBUSTNESS).json()["measurement"]["state"] == "not asked"


def test_only_operators_measure_and_only_rounds_that_are_there(
    loud: Path, client: TestClient, sign_in: Callable[[str], str]
) -> None:
    assert client.post(ASK, data={"round": "1"}).status_code == 401
    csrf = sign_in("vera")
    assert client.post(ASK, data={"csrf": csrf, "round": "1"}).status_code == 403
    client.cookies.clear()
    csrf = sign_in("olga")
    assert client.get(ASK).headers["location"] == "/runs/loud/robustness"
    assert client.post(ASK, data={"round": "1"}).status_code == 403
    for number, status in (("0", 404), ("9", 404), ("9" * 30, 404), ("two", 409), ("", 409)):
        answer = client.post(ASK, data={"csrf": csrf, "round": number})
        assert answer.status_code == status
    assert client.get("/api/v1/runs/loud/rounds/9/distances").status_code == 404
    assert client.app.state.site.jobs.json() == []  # type: ignore[attr-defined]
    asked = {"data": {"csrf": csrf, "round": "1"}, "headers": {"accept": "application/json"}}
    answer = client.post(ASK, **asked)
    assert answer.status_code == 202
    wait(client)
    told = client.get(answer.json()["measured at"]).json()
    assert told["measurement"]["state"] == "finished"


def test_a_damaged_update_is_told_in_one_line_and_measured_when_it_is_back(
    loud: Path, client: TestClient, sign_in: Callable[[str], str]
) -> None:
    csrf = sign_in("olga")
    ledger = Ledger(loud)
    entry = ledger.round(3)
    assert entry is not None
    blob = ledger.blobs.path(accepted_updates(entry)[0]["update"])
    ledger.close()
    sound = blob.read_bytes()
    blob.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    told = measured(client, csrf, 3)
    assert told["measurement"]["state"] == "failed"
    assert "was changed on disk" in told["measurement"]["said"]
    assert "distance" not in told["tables"]["influence"]["columns"]
    page = client.get("/runs/loud/robustness", headers={"accept": "text/html"}).text
    (line,) = re.findall(r"Round 3 was not measured: (.*)</p>", page)
    assert "Traceback" not in line
    blob.write_bytes(sound)
    assert measured(client, csrf, 3)["measurement"]["state"] == "finished"


def _silent(event: events.Event) -> None:
    pass
