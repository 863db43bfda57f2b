"""Numbers on pages are the ledger's and those of metrics.jsonl; every view is also JSON and CSV."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from fedserver import metrics, quantities
from fedserver.configuration import parse
from fedserver.dashboard import library_views, round_views
from fedserver.dashboard.accounts import Accounts
from fedserver.dashboard.application import live_payload, make_application
from fedserver.dashboard.guard import COOKIE
from fedserver.dashboard.library import Library
from fedserver.dashboard.page import Question
from fedserver.dashboard.registry import VIEWS
from fedserver.dashboard.run_reader import RunReader
from fedserver.dashboard.tables import to_csv
from fedserver.ledger import Ledger

NAMES = ("clinic", "school", "phone")
LOSSES = st.none() | st.floats(0, 50)
EVALUATIONS = st.none() | st.fixed_dictionaries(
    {
        "loss_sum": st.floats(0, 1e4),
        "tokens": st.integers(1, 1000),
        "correct": st.just(0),
        "examples": st.just(1),
        "new_loss_sum": st.just(0.0),
        "new_tokens": st.just(0),
    }
)


@st.composite
def rounds(draw: st.DrawFn) -> list[dict[str, Any]]:
    found = []
    for _ in range(draw(st.integers(0, 4))):
        nodes = []
        for name in NAMES:
            accepted = draw(st.booleans())
            nodes.append(
                {
                    "node": name,
                    "round": 1,
                    "plan": {"action": "train", "method": {"family": "low_rank", "rank": 3}},
                    "base_format": "full",
                    "choice": "",
                    "sends": "rank 3",
                    "verdict": "accepted"
                    if accepted
                    else draw(st.sampled_from(["late", "missing"])),
                    "reason": "",
                    "bytes_up": draw(st.integers(0, 10**9)),
                    "bytes_down": draw(st.integers(0, 10**9)),
                    "update": None,
                    "share": draw(st.floats(0, 1)) if accepted else 0.0,
                    "memory_bytes": 1,
                    **({"report": {"train_loss": draw(LOSSES), "examples": 3}} if accepted else {}),
                    **({"norm": draw(st.floats(0, 10)), "family": "low_rank"} if accepted else {}),
                }
            )
        found.append({"nodes": nodes, "entering": draw(EVALUATIONS), "entering_by_format": {}})
    return found


@settings(max_examples=25)
@given(rounds())
def test_the_live_view_says_what_ledger_and_metrics_say(content: list[dict[str, Any]]) -> None:
    configuration = parse({"nodes": [{"name": name} for name in NAMES]})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        ledger = Ledger(folder, create=True)
        ledger.append("genesis", 0, {"configuration": configuration.identity()}, {})
        for number, one in enumerate(content, start=1):
            ledger.append(
                "round",
                number,
                {"quorum": True, "state": "", "carry_rank": 3, "tail_energy": 0.25} | one,
                {
                    "started": 5.0,
                    "seconds": number / 7,
                    "nodes": dict.fromkeys(NAMES, 1.5),
                    "memory": {},
                },
            )
        metrics.write(ledger, configuration, folder / "metrics.jsonl")
        ledger.close()
        run = RunReader(folder, "run")
        page = round_views.live(run, Question())
        told, tiles = page.data["totals"], live_payload(run)["fragments"]["tiles"]
        nodes = [node for one in content for node in one["nodes"]]
        expected = {
            "bytes_up": sum(node["bytes_up"] for node in nodes),
            "bytes_down": sum(node["bytes_down"] for node in nodes),
            "accepted": sum(node["verdict"] == "accepted" for node in nodes),
            "rejected": sum(node["verdict"] != "accepted" for node in nodes),
            "seconds": sum(number / 7 for number in range(1, len(content) + 1)),
        }
        assert {key: told[key] for key in expected} == pytest.approx(expected)
        written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curves = page.data["curves"]
        for key, values in curves.items():
            assert values == [row[key] for row in written]
        # What a round's model scored stands in the next round's entry.
        for place, one in enumerate(content[1:]):
            sums = one["entering"]
            wanted = None if sums is None else sums["loss_sum"] / sums["tokens"]
            assert curves["eval_loss"][place] == wanted
        shown = [float(value) for value in re.findall(r'<data value="([^"]+)"', tiles)]
        for key in ("bytes_up", "bytes_down", "accepted", "rejected", "seconds"):
            assert told[key] in shown
        if told["eval_loss"] is not None:
            assert told["eval_loss"] in shown
        for number, one in enumerate(content, start=1):
            table = round_views.one_round(run, Question(round=number)).tables["nodes"]
            assert [(r["node"], r["verdict"], r["bytes_up"], r["share"]) for r in table.rows] == [
                (n["node"], n["verdict"], n["bytes_up"], n["share"]) for n in one["nodes"]
            ]


def test_every_view_is_html_json_and_csv_and_in_the_document(
    client: TestClient, sign_in: Callable[[str], str]
) -> None:
    sign_in("vera")
    document = client.get("/api/v1/openapi.json").json()
    pages = [("/runs/{run}/" + (view.name or "live"), view) for view in VIEWS]
    tables = 0
    for address, view in pages:
        path = address.replace("{run}", "mixed")
        answer = client.get(path.removesuffix("/live"), headers={"accept": "text/html"})
        assert answer.status_code == 200, path
        told = client.get(f"/api/v1{path}").json()
        assert told["run"] == "mixed"
        assert set(told["tables"]) == set(view.tables)
        assert address in document["paths"]
        for name, table in told["tables"].items():
            answer = client.get(f"/api/v1{path}/{name}.csv")
            rows = list(csv.DictReader(io.StringIO(answer.text)))
            assert next(csv.reader(io.StringIO(answer.text))) == table["columns"]
            assert len(rows) == table["total"]
            assert f"{address}/{name}.csv" in document["paths"]
            tables += len(rows) > 0
    assert tables > 6
    client.cookies.clear()
    sign_in("olga")  # operators see all that is described
    for address, methods in document["paths"].items():
        if "get" not in methods:
            continue
        path = address.replace("{run}", "mixed").replace("{round}", "2")
        assert client.get(f"/api/v1{path}").status_code == 200, path


def test_rounds_and_nodes_of_a_real_run_are_those_of_its_ledger(
    client: TestClient, sign_in: Callable[[str], str], runs: Path
) -> None:
    sign_in("vera")
    ledger = Ledger(runs / "mixed")
    entry = list(ledger.entries("round"))[1]
    ledger.close()
    table = client.get("/api/v1/runs/mixed/rounds/2").json()["tables"]["nodes"]["rows"]
    assert len(table) == len(entry.content["nodes"])
    for row, node in zip(table, entry.content["nodes"], strict=True):
        assert row["node"] == node["node"]
        assert row["verdict"] == node["verdict"]
        assert row["reason"] == node["reason"]
        assert row["norm"] == node.get("norm")
        assert row["staleness"] == 2 - node["round"]
    families = {row["family"] for row in table}
    assert families == {"low rank", "seed scalars", "sketch"}
    verdicts = {row["verdict"] for row in table}
    assert {"accepted", "late"} < verdicts
    live = client.get("/api/v1/runs/mixed/live").json()
    summary = json.loads((runs / "mixed" / "summary.json").read_text())
    rows = [
        json.loads(line) for line in (runs / "mixed" / "metrics.jsonl").read_text().splitlines()
    ]
    assert live["totals"]["eval_loss"] == rows[-1]["eval_loss"] is not None
    assert live["totals"]["bytes_full_model"] == summary["bytes_full_model"]
    assert live["totals"]["bytes_full_lora"] == summary["bytes_full_lora"]
    for word in ("privacy", "robustness"):
        page = client.get(f"/runs/mixed/{word}", headers={"accept": "text/html"}).text
        assert "No differential privacy" in page or "No robust rule" in page


def test_runs_compare_and_live_say_the_same_of_a_run(
    client: TestClient, sign_in: Callable[[str], str], runs: Path
) -> None:
    """Bytes and seconds of all messages, the chain's head, and which of two like runs it is."""
    shutil.copytree(runs / "mixed", runs / "mixed-again")
    sign_in("vera")
    summary = json.loads((runs / "mixed" / "summary.json").read_text())
    ledger = Ledger(runs / "mixed")
    assert ledger.last("evaluation") is not None
    head = ledger.head
    ledger.close()
    table = library_views.runs(Library(runs), Question()).tables["runs"]
    listed = table.rows
    compared = client.get("/api/v1/compare?run=mixed&run=mixed-again").json()["tables"]
    live = client.get("/api/v1/runs/mixed/live").json()
    assert live["head"] == head == summary["head"]
    for key in ("bytes_up", "bytes_down", "seconds"):
        for rows in (listed, compared["compared"]["rows"]):
            assert [row[key] for row in rows] == [pytest.approx(summary[key])] * 2
        assert live["totals"][key] == pytest.approx(summary[key])
    assert [row["loss_after"] for row in listed] == [pytest.approx(live["totals"]["eval_loss"])] * 2
    assert live["totals"]["eval_loss"] == pytest.approx(summary["eval_loss"])
    assert {row["head"] for row in compared["compared"]["rows"]} == {head}
    for rows in (listed, compared["compared"]["rows"]):
        assert {row["run"] for row in rows} == {"mixed", "mixed-again"}
        assert {row["seed"] for row in rows} == {4}
    assert compared["settings"]["columns"] == ["key", "mixed", "mixed-again"]
    text = io.StringIO(to_csv(table))
    assert {row["run"] for row in csv.DictReader(text)} == {"mixed", "mixed-again"}


def test_settings_differ_where_they_read_differently_and_of_a_missing_node_only_that(
    runs: Path, accounts: Accounts
) -> None:
    """And the name of a run in a heading turns nothing around."""
    node = {"name": "a.b", "description": "", "lora_r": 3}
    for name, nodes in (
        ("one", [node, {"name": "c", "lora_r": 4}]),
        ("two\u202e", [{"name": "a.b", "lora_r": 5}]),
    ):
        ledger = Ledger(runs / name, create=True)
        configuration = {"seed": None, "nodes": nodes} | ({} if name == "one" else {"name": ""})
        ledger.append("genesis", 0, {"configuration": configuration}, {})
        ledger.close()
    chosen = ("one", "two\u202e")
    table = library_views.compare(Library(runs), Question(runs=chosen)).tables["settings"]
    assert [tuple(row.values()) for row in table.rows] == [
        ("nodes.a.b.lora_r", "3", "5"),
        ("nodes.c", "present", None),
    ]
    application = make_application(runs, accounts, hosts=["testserver"])
    with TestClient(application, base_url="https://testserver") as client:
        client.cookies.set(COOKIE, accounts.open_session("olga", "operator"))
        page = client.get("/compare?run=one&run=two%E2%80%AE", headers={"accept": "text/html"})
        assert "nodes.c" in page.text
        # What is sent back is the name as it is; what is shown is not.
        assert "\u202e" not in re.sub(r'value="[^"]*"', "", page.text)


def test_a_run_that_went_on_is_not_described_by_its_earlier_end(
    client: TestClient, sign_in: Callable[[str], str], runs: Path
) -> None:
    """The summary and the report of a stop say nothing of the rounds since."""
    sign_in("vera")
    assert client.get("/api/v1/runs/mixed/live").json()["report"] is True
    live = json.loads((runs / "mixed" / "live.json").read_text())
    (runs / "mixed" / "live.json").write_text(json.dumps(live | {"committed": 2}))
    rows = (runs / "mixed" / "metrics.jsonl").read_text().splitlines()[:2]
    (runs / "mixed" / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    os.utime(runs / "mixed" / "report.html", ns=(10**18, 10**18))
    told = client.get("/api/v1/runs/mixed/live").json()
    assert told["report"] is False
    ledger = Ledger(runs / "mixed")
    ends = [e for kind in ("evaluation", "ablation") for e in ledger.entries(kind)]
    ledger.close()
    assert ends
    for key in ("bytes_up", "bytes_down", "seconds"):
        expected = sum(json.loads(row)[key] for row in rows) + sum(
            entry.wall["seconds"]
            if key == "seconds"
            else sum(node[key] for node in entry.content["nodes"])
            for entry in ends
        )
        assert told["totals"][key] == pytest.approx(expected)
        (row,) = library_views.runs(Library(runs), Question()).tables["runs"].rows
        assert row[key] == told["totals"][key]


def test_the_shares_of_a_family_are_one_together(
    client: TestClient, sign_in: Callable[[str], str]
) -> None:
    sign_in("vera")
    influence = client.get("/api/v1/runs/mixed/robustness").json()["tables"]["influence"]["rows"]
    nodes = client.get("/api/v1/runs/mixed/rounds/3").json()["tables"]["nodes"]["rows"]
    participation = client.get("/api/v1/runs/mixed/privacy").json()["tables"]["participation"]
    for rows, key in ((influence, "share"), (nodes, "family_share")):
        sums: dict[str, float] = {}
        for row in rows:
            sums[row["family"]] = sums.get(row["family"], 0.0) + (row[key] or 0.0)
        assert {family for family, whole in sums.items() if whole} == {
            "low rank", "seed scalars", "sketch",
        }  # fmt: skip
        assert all(whole in (0.0, pytest.approx(1.0)) for whole in sums.values())
    families = [row["family"] for row in influence]
    assert families == sorted(families)
    by_node = {row["node"]: row["share"] for row in participation["rows"]}
    assert by_node == {row["node"]: row["share"] for row in influence}


def test_the_report_draws_the_series_of_the_dashboard(
    client: TestClient, sign_in: Callable[[str], str], runs: Path
) -> None:
    sign_in("vera")
    answer = client.get("/runs/mixed/report.html")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.text == (runs / "mixed" / "report.html").read_text()
    curves = client.get("/api/v1/runs/mixed/live").json()["curves"]
    assert len(curves["round"]) == 3
    titles = {html.unescape(title) for title in re.findall("<title>(.*?)</title>", answer.text)}
    for key, name in (("loss", "training, mean"), ("eval_loss", "evaluation")):
        for number, value in zip(curves["round"], curves[key], strict=True):
            assert value is not None
            assert f"{name}, {number}: {value:.6g}" in titles
    for key, name in (("bytes_up", "up"), ("bytes_down", "down")):
        for number, value in zip(curves["round"], curves[key], strict=True):
            assert f"{number}, {name}: {quantities.bytes_text(value)}" in titles


def test_tables_are_searched_sorted_and_cut(
    client: TestClient, sign_in: Callable[[str], str]
) -> None:
    sign_in("vera")
    rows = client.get("/api/v1/runs/mixed/fleet?q=WORKSTATION").json()["tables"]["fleet"]["rows"]
    assert [row["node"] for row in rows] == ["clinic"]
    for sort in ("round", "-round"):
        table = client.get(f"/api/v1/runs/mixed/rounds?sort={sort}").json()["tables"]["rounds"]
        found = [row["round"] for row in table["rows"]]
        assert found == sorted(found, reverse=sort.startswith("-"))
    odd = "/api/v1/runs/mixed/log?page=99999999&sort=nothing&q=committed"
    log = client.get(odd).json()["tables"]["log"]["rows"]
    assert len(log) == 3
    for path in ("/api/v1/runs/none/live", "/api/v1/runs/mixed/none", "/api/v1/runs/mixed/rounds/77",
                 "/api/v1/runs/..%2Fmixed/live", "/runs/.dashboard", "/static/../html.py"):  # fmt: skip
        assert client.get(path).status_code in (404, 401), path


def test_a_damaged_chain_is_found_and_a_half_run_is_shown(
    client: TestClient, sign_in: Callable[[str], str], runs: Path
) -> None:
    import sqlite3

    sign_in("vera")
    assert client.get("/api/v1/runs/mixed/ledger/verify").json()["problems"] == []
    database = sqlite3.connect(runs / "mixed" / "ledger.db")
    database.execute("UPDATE entries SET content = replace(content, '0.', '1.') WHERE height = 2")
    database.commit()
    database.close()
    assert client.get("/api/v1/runs/mixed/ledger/verify").json()["problems"]
    with (runs / "mixed" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "lo')
    with (runs / "mixed" / "events.jsonl").open("a") as file:
        file.write('{"time"')
    (runs / "mixed" / "live.json").write_text("{")
    for view in VIEWS:
        path = f"/runs/mixed/{view.name}".rstrip("/")
        assert client.get(path, headers={"accept": "text/html"}).status_code == 200, path
    assert math.isfinite(client.get("/api/v1/runs/mixed/live").json()["totals"]["bytes_up"])
