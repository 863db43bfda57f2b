"""A round replayed from the dashboard: the ledger's digest again, or a plain word that it is not."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from fedserver.ledger import Ledger


def replayed(client: TestClient, csrf: str, number: int) -> dict[str, Any]:
    answer = client.post("/runs/mixed/ledger/replay", data={"csrf": csrf, "round": str(number)})
    assert answer.status_code == 303
    for _, job in client.app.state.site.replays._found.items():  # type: ignore[attr-defined]
        job.process.wait()
    found: dict[str, Any] = client.get(f"/api/v1{answer.headers['location']}").json()
    return found


def test_a_replayed_round_has_the_recorded_digest_and_a_damaged_one_says_so(
    client: TestClient, sign_in: Callable[[str], str], runs: Path
) -> None:
    csrf = sign_in("olga")
    ledger = Ledger(runs / "mixed")
    states = {entry.round: entry.content["state"] for entry in ledger.entries("round")}
    nodes = next(iter(ledger.entries("round"))).content["nodes"]
    update = next(node["update"] for node in nodes if node["update"])
    before = ledger.height
    ledger.close()
    assert client.get("/api/v1/runs/mixed/rounds/2/replay").json()["state"] == "not asked"
    found = replayed(client, csrf, 2)
    assert (found["state"], found["equal"], found["rounds_done"]) == ("finished", True, 2)
    assert found["recorded"] == found["replayed"] == states[2]
    for number in ("0", "9", "two", ""):
        data = {"csrf": csrf, "round": number}
        assert client.post("/runs/mixed/ledger/replay", data=data).status_code in (404, 409)
    assert client.post("/runs/mixed/ledger/replay", data={"round": "2"}).status_code == 403
    # A replay changes nothing, so it stands in no ledger.
    database = sqlite3.connect(runs / "mixed" / "ledger.db")
    assert database.execute("SELECT COUNT(*) FROM entries").fetchone()[0] == before
    database.close()
    blob = next(path for path in (runs / "mixed" / "blobs").rglob("*") if update in path.name)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x00")
    found = replayed(client, csrf, 1)
    assert found["state"] == "failed"
    assert found["equal"] is None
    assert found["said"]


def test_a_replay_is_compared_with_what_is_recorded_now_and_forgotten_with_its_log(
    client: TestClient, sign_in: Callable[[str], str], runs: Path
) -> None:
    csrf = sign_in("olga")
    page = "/api/v1/runs/mixed/rounds/1/replay"
    assert replayed(client, csrf, 1)["equal"] is True
    database = sqlite3.connect(runs / "mixed" / "ledger.db")
    other = "ab" * 32
    database.execute(
        "UPDATE entries SET content = json_set(content, '$.state', ?) WHERE kind = 'round'",
        (other,),
    )
    database.commit()
    database.close()
    found = client.get(page).json()
    assert (found["state"], found["recorded"], found["equal"]) == ("finished", other, False)
    for log in (runs / ".dashboard").glob("job-*.log"):
        log.unlink()
    found = client.get(page).json()
    assert (found["state"], found["replayed"], found["equal"]) == ("not asked", None, None)


def test_signatures_of_updates_and_the_servers_key_are_shown(
    client: TestClient, sign_in: Callable[[str], str], runs: Path
) -> None:
    sign_in("vera")
    ledger = Ledger(runs / "mixed")
    entry = next(entry for entry in ledger.entries("round") if entry.round == 2)
    ledger.close()
    assert entry.signatures
    rows = client.get("/api/v1/runs/mixed/rounds/2").json()["tables"]["nodes"]["rows"]
    for row, node in zip(rows, entry.content["nodes"], strict=True):
        signed = entry.signatures.get(node["update"])
        assert row["signed_by"] == (signed["key"] if signed else None)
    told = client.get("/api/v1/runs/mixed/ledger").json()
    last = max(e["round"] for e in told["tables"]["entries"]["rows"] if e["kind"] == "round")
    assert told["signed"] > 0
    assert told["signed"] <= told["updates"]
    assert last == told["rounds_recorded"][0]
    assert len(bytes.fromhex(told["sealed_by"])) == 32
