"""A program that reads the document can act: every form's address, fields and answers are in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from starlette.testclient import TestClient

from fedserver.control import ARGUMENTS, ControlQueue
from fedserver.dashboard.accounts import OPERATOR, Accounts

VALUES = {"reason": "why", "node": "cafe", "round": "1", "kind": "merged", "quorum": "1"}


def test_every_action_is_described_and_answers_as_described(
    client: TestClient, sign_in: Callable[[str], str], accounts: Accounts, runs: Path
) -> None:
    token = {"authorization": f"Bearer {accounts.issue_token('robot', OPERATOR)}"}
    paths = client.get("/api/v1/openapi.json", headers=token).json()["paths"]
    posts = {path: methods["post"] for path, methods in paths.items() if "post" in methods}
    actions = {path.rpartition("/")[2] for path in posts if "/actions/" in path}
    assert actions == set(ARGUMENTS) - {"start"}
    live = json.loads((runs / "mixed" / "live.json").read_text())
    states = {"resume": "paused", "pause": "held", "stop": "held"}
    accept = {"accept": "application/json"}
    for path, post in posts.items():
        assert paths[path]["servers"] == [{"url": "/"}]
        address, action = path.replace("{run}", "mixed"), path.rpartition("/")[2]
        assert client.post(address, headers=accept).status_code == 401
        assert {"401", "403", "409"} < set(post["responses"])
        schema = post["requestBody"]["content"]["application/x-www-form-urlencoded"]["schema"]
        assert set(schema["required"]) <= set(schema["properties"])
        # Without what is needed it is refused, as the document says.
        assert client.post(address, headers=token | accept).status_code == 409
        if "/actions/" not in path or action in ("continue", "export"):
            continue
        state = states.get(action, "stopped")
        told = {"state": "running", "phase": state} if action in states else {"state": state}
        (runs / "mixed" / "live.json").write_text(json.dumps(live | {"host": "another"} | told))
        form = {name: VALUES[name] for name in schema["properties"] if name in VALUES}
        answer = client.post(address, data=form, headers=token | accept)
        assert answer.status_code == 202, (address, answer.text)
        asked = ControlQueue(runs / "mixed").requests()[0]
        assert (asked.action, asked.reason) == (action, "why")
        assert {k: str(v) for k, v in asked.arguments.items()}.items() <= form.items()
    csrf = sign_in("olga")
    by_header = client.post("/runs/mixed/actions/pause", headers={"x-csrf-token": csrf})
    assert by_header.status_code == 409
    assert client.post("/runs/mixed/actions/pause").status_code == 403
