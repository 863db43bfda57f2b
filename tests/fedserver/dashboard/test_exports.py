"""An export is offered where it can be made, and told by its outcome, in requests and ledger."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fedserver.control import OPERATOR, ControlQueue
from fedserver.dashboard import errands, recording
from fedserver.ledger import Ledger, LedgerHeldError

Sign = Callable[[str], str]


def wait(client: TestClient) -> None:
    for job in client.app.state.site.jobs._jobs:  # type: ignore[attr-defined]
        job.process.wait()


def export(client: TestClient, csrf: str, kind: str) -> Any:
    data = {"csrf": csrf, "reason": "to try it", "kind": kind}
    return client.post("/runs/mixed/actions/export", data=data)


def recorded(folder: Path) -> list[dict[str, Any]]:
    ledger = Ledger(folder)
    try:
        assert ledger.verify() == []
        return [entry.content for entry in ledger.entries(OPERATOR)]
    finally:
        ledger.close()


def test_only_what_is_possible_is_offered(client: TestClient, sign_in: Sign, runs: Path) -> None:
    """Dense random probes are no low-rank factors: that model is merged or not exported."""
    csrf = sign_in("olga")
    page = client.get("/runs/mixed/control").text
    assert re.findall(r'name="kind" value="(\w+)"', page) == ["merged"]
    answer = export(client, csrf, "peft")
    assert answer.status_code == 409
    assert "merged" in answer.text
    assert not recorded(runs / "mixed")
    rows = (runs / "mixed" / "metrics.jsonl").read_text()
    (runs / "mixed" / "metrics.jsonl").write_text("")
    told = client.get("/api/v1/runs/mixed/control").json()
    assert "export" not in told["offered"]
    assert set(told["exports"]) == {"peft", "merged"}
    assert all(told["exports"].values())
    assert export(client, csrf, "merged").status_code == 409
    (runs / "mixed" / "metrics.jsonl").write_text(rows)


def test_an_export_is_of_the_round_that_its_name_says(
    client: TestClient, sign_in: Sign, runs: Path
) -> None:
    """The page was of round 2 when it was asked for; the run has committed another one since."""
    folder = runs / "mixed"
    csrf = sign_in("olga")
    live = json.loads((folder / "live.json").read_text())
    (folder / "live.json").write_text(json.dumps(live | {"committed": 2}))
    rows = (folder / "metrics.jsonl").read_text().splitlines()[:2]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert export(client, csrf, "merged").status_code == 303
    wait(client)
    (entry,) = recorded(folder)
    assert entry["outcome"] == "done", entry["note"]
    assert entry["arguments"]["round"] == 2
    assert entry["arguments"]["to"].endswith("round-2")
    ledger = Ledger(folder)
    third, second = sorted(ledger.entries("round"), key=lambda one: -one.round)[:2]
    ledger.close()
    card = (folder / entry["arguments"]["to"] / "README.md").read_text()
    assert "rounds: 2 of 3" in card
    assert second.hash in card
    assert third.hash not in card


@pytest.mark.parametrize("target", ["free", "taken"])
def test_the_outcome_of_an_export_is_told_and_recorded(
    client: TestClient, sign_in: Sign, runs: Path, target: str
) -> None:
    folder = runs / "mixed"
    csrf = sign_in("olga")
    if target == "taken":
        # Where the model would be written stands a file.
        (folder / "exports").write_text("in the way")
    assert export(client, csrf, "merged").status_code == 303
    wait(client)
    (request,) = client.get("/api/v1/runs/mixed/control").json()["tables"]["requests"]["rows"]
    (entry,) = recorded(folder)
    assert (entry["outcome"], entry["note"]) == (request["state"], request["note"])
    assert entry["arguments"]["kind"] == "merged"
    row = client.get("/api/v1/runs/mixed/ledger").json()["tables"]["actions"]["rows"][0]
    assert row["outcome"] == entry["outcome"]
    if target == "taken":
        assert request["state"] == "failed"
        assert "exports" in request["note"]
    else:
        assert request["state"] == "done"
        written = folder / entry["arguments"]["to"]
        assert json.loads((written / "config.json").read_text())["model_type"] == "llama"


def test_what_is_being_made_is_not_asked_for_again(
    client: TestClient, sign_in: Sign, runs: Path
) -> None:
    csrf = sign_in("olga")
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: export(client, csrf, "merged"), range(4)))
    assert sorted(answer.status_code for answer in answers) == [303, 409, 409, 409]
    assert all("asked for it already" in a.text for a in answers if a.status_code == 409)
    wait(client)
    assert [entry["outcome"] for entry in recorded(runs / "mixed")] == ["done"]
    assert export(client, csrf, "merged").status_code == 303
    wait(client)


def test_an_outcome_is_recorded_however_long_others_write_the_ledger(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs / "mixed"
    queue = ControlQueue(folder)
    arguments = {"kind": "merged", "round": 3, "to": "exports/merged-round-3"}
    asked = queue.ask("export", arguments, who="olga", role="operator", reason="to try it")
    queue.say(asked, "done", "exports/merged-round-3")
    append, tried = recording.append, iter(range(40))

    def busy(*words: Any, **options: Any) -> None:
        if next(tried) < 30:
            raise LedgerHeldError("another process is running this run")
        append(*words, **options)

    monkeypatch.setattr(recording, "append", busy)
    monkeypatch.setattr(errands, "HELD_SECONDS", 0.0)
    errands._record(folder, queue, asked.id, {"key_file": None, "round": 3})
    (entry,) = recorded(folder)
    assert entry["outcome"] == "done"
    assert not queue.outcomes()
