"""Prometheus reads what metrics.jsonl says, and the Grafana board asks for nothing that is not there."""

from __future__ import annotations

import json
import os
import re
import socket
from collections import Counter
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from fedhost.process_identity import process_identity
from fedserver.dashboard.accounts import Accounts
from fedserver.dashboard.application import make_application
from fedserver.ledger import Ledger

BOARD = Path(__file__).resolve().parents[3] / "docs" / "grafana-dashboard.json"


def test_a_scrape_is_the_runs_metrics_and_fills_the_board(accounts: Accounts, runs: Path) -> None:
    live = runs / "mixed" / "live.json"
    # The same run as long as it is under way: in this process.
    told = json.loads(live.read_text()) | {"state": "running", "phase": "train"}
    told |= {"process": process_identity(os.getpid()), "host": socket.gethostname()}
    live.write_text(json.dumps(told))
    bearer = {"authorization": f"Bearer {accounts.issue_token('prometheus', 'viewer')}"}
    client = TestClient(make_application(runs, accounts, hosts=["testserver"]))
    assert client.get("/metrics").status_code == 401
    text = client.get("/metrics", headers=bearer).text
    families = list(text_string_to_metric_families(text))
    found = {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "run")): sample.value
        for family in families
        for sample in family.samples
    }
    rows = [
        json.loads(line) for line in (runs / "mixed" / "metrics.jsonl").read_text().splitlines()
    ]
    assert found["fedbraid_runs", "running"] == 1
    assert found["fedbraid_run_rounds_committed_total",] == len(rows)
    summary = json.loads((runs / "mixed" / "summary.json").read_text())
    for direction in ("up", "down"):
        total = summary[f"bytes_{direction}"]
        assert found["fedbraid_run_bytes_total", direction] == total
    for family in ("low_rank", "seed_scalars", "sketch"):
        count = sum(row["families"].get(family, 0) for row in rows)
        assert found["fedbraid_run_updates_total", family] == count > 0
    ledger = Ledger(runs / "mixed")
    nodes = [node for entry in ledger.entries("round") for node in entry.content["nodes"]]
    ledger.close()
    verdicts = Counter(node["verdict"] for node in nodes)
    assert {"accepted", "missing", "late"} < set(verdicts), verdicts
    told = {key[1]: value for key, value in found.items() if key[0] == "fedbraid_run_replies_total"}
    assert told == verdicts
    # Nothing counts twice: a late reply is one, and what was missing is the question of its own round.
    seen = [(node["node"], node["round"], node["verdict"]) for node in nodes]
    assert len(seen) == len(set(seen)) == sum(told.values())
    assert found["fedbraid_run_loss", "eval"] == rows[-1]["eval_loss"]
    assert found["fedbraid_run_phase", "train"] == 1
    # It ends, and keeps what it had; what was of the moment is over.
    live.write_text(json.dumps(told | {"state": "finished", "phase": ""}))
    client = TestClient(make_application(runs, accounts, hosts=["testserver"]))
    ended = client.get("/metrics", headers=bearer).text
    kept = [line for line in ended.splitlines() if line.startswith("fedbraid_run_")]
    again = client.get("/metrics", headers=bearer).text.splitlines()
    assert kept == [line for line in again if line.startswith("fedbraid_run_")]
    before = [line for line in text.splitlines() if line.startswith("fedbraid_run_")]
    gone = {line.partition("{")[0] for line in before} - {line.partition("{")[0] for line in kept}
    assert gone == {"fedbraid_run_phase", "fedbraid_run_nodes", "fedbraid_run_operator_requests"}
    for name in ("updates_total", "replies_total", "rounds_committed_total", "loss", "carry_rank"):
        values = [[one for one in lines if f"_{name}{{" in one] for lines in (before, kept)]
        assert values[0] == values[1] != []
    known = {metric.name for metric in families} | {key[0] for key in found}
    panels = json.loads(BOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    # No budget is accounted in this run, so that one metric has no sample; its name is declared.
    for expression in expressions:
        match = re.match(r"[a-z_]+", expression)
        assert match is not None
        assert match.group(0) in known, expression
