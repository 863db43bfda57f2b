"""A refused form is the page again, with what was typed and why; a start that fails leaves no trace."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.testclient import TestClient

from fedserver.control import ControlQueue
from fedserver.dashboard.accounts import Accounts

Sign = Callable[[str], str]


def stopped(folder: Path) -> None:
    live = json.loads((folder / "live.json").read_text())
    (folder / "live.json").write_text(json.dumps(live | {"state": "stopped"}))


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(
    ("address", "typed"),
    [
        ("/runs/mixed/actions/next_round", {"deadline_seconds": "5", "quorum": "many"}),
        ("/runs/mixed/actions/rollback", {"round": "two"}),
        ("/start", {"name": "no name!", "overrides": "rounds=2\nlora_r=3"}),
    ],
)
def test_a_refused_form_is_shown_with_what_was_typed_and_why(
    client: TestClient, sign_in: Sign, runs: Path, address: str, typed: dict[str, str], stale: bool
) -> None:
    stopped(runs / "mixed")
    csrf = sign_in("olga")
    form = typed | {"reason": 'the link is "slow"', "csrf": "old" if stale else csrf}
    answer = client.post(address, data=form)
    assert answer.status_code == (403 if stale else 409)
    for value in (*typed.values(), form["reason"]):
        assert html.escape(value).replace("&quot;", "&#34;") in answer.text
    assert 'role="alert"' in answer.text
    # It can be sent again as it stands.
    assert csrf in answer.text
    assert not ControlQueue(runs / "mixed").requests()


def test_where_a_form_is_sent_can_be_opened(client: TestClient, sign_in: Sign) -> None:
    sign_in("olga")
    for address, page in (
        ("/runs/mixed/actions/pause", "/runs/mixed/control"),
        ("/runs/mixed/ledger/replay", "/runs/mixed/ledger"),
        ("/devices/invite", "/devices"),
        ("/access/revoke", "/access"),
    ):
        answer = client.get(address)
        assert (answer.status_code, answer.headers["location"]) == (303, page)
        assert client.get(page).status_code == 200
    assert "<h1>" in client.get("/runs/mixed/ledger/verify").text


def test_other_forms_are_shown_again_too(
    client: TestClient, sign_in: Sign, accounts: Accounts
) -> None:
    csrf = sign_in("olga")
    token = accounts.issue_token("robot", "viewer")
    identity = accounts.tokens()[0].id
    assert token not in identity
    for address, form in (
        ("/access/revoke", {"token": identity, "reason": "it leaked"}),
        ("/devices/invite", {"name": "cafe", "hours": "3", "reason": "a new one"}),
        ("/runs/mixed/ledger/replay", {"round": "2"}),
    ):
        answer = client.post(address, data=form | {"csrf": "old"})
        assert answer.status_code == 403, address
        assert "<h1>" in answer.text
        assert "send it again" in answer.text
    page = client.post("/access/revoke", data={"token": identity, "reason": "it leaked"}).text
    assert "it leaked" in page
    assert f'value="{identity}" selected' in page
    assert (
        client.post("/runs/mixed/ledger/replay", data={"csrf": csrf, "round": "x"}).status_code
        == 409
    )
    answer = client.post("/login", data={"name": "olga", "password": "wrong"})
    assert answer.status_code == 401
    assert 'value="olga"' in answer.text


def test_what_was_typed_is_shown_to_who_was_signed_out_meanwhile(
    client: TestClient, sign_in: Sign, runs: Path
) -> None:
    """A browser is led back to the form's page; nothing is done, and programs get a line."""
    stopped(runs / "mixed")
    form = {"csrf": sign_in("olga"), "reason": "<b>a long\u202e reason", "round": "2"}
    client.cookies.clear()
    path = "/runs/mixed/actions/rollback"
    answer = client.post(path, data=form, headers={"accept": "text/html"})
    assert answer.status_code == 401
    assert "&lt;b&gt;a long\ufffd reason" in answer.text
    assert form["csrf"] not in answer.text
    wanted = re.search(r'name="wanted" value="([^"]*)"', answer.text)
    assert wanted is not None
    signed = client.post(
        "/login", data={"name": "olga", "password": "correct horse battery", "wanted": wanted[1]}
    )
    assert client.get(signed.headers["location"]).headers["location"] == "/runs/mixed/control"
    assert not ControlQueue(runs / "mixed").requests()
    client.cookies.clear()
    # Another site's page cannot put its words onto this one.
    foreign = {"accept": "text/html", "sec-fetch-site": "cross-site"}
    assert "a long" not in client.post(path, data=form, headers=foreign).text
    assert client.post("/logout", headers={"accept": "text/html"}).status_code == 401
    for accept, said in (
        ("*/*", "sign in first"),
        ("application/json", '{"error":"sign in first"}'),
    ):
        answer = client.post(path, data=form, headers={"accept": accept})
        assert (answer.status_code, answer.text) == (401, said)


def test_a_viewer_is_turned_away_by_a_page_and_a_program_by_a_line(
    client: TestClient, sign_in: Sign
) -> None:
    sign_in("vera")
    page = client.get("/access", headers={"accept": "text/html"})
    assert page.status_code == 403
    assert "<nav" in page.text
    assert "operator" in page.text
    assert client.get("/api/v1/access", headers={"accept": "application/json"}).json()["error"]
    assert "<" not in client.get("/api/v1/access").text


def test_a_wrong_password_ends_no_session(client: TestClient, sign_in: Sign) -> None:
    sign_in("olga")
    assert client.post("/login", data={"name": "vera", "password": "wrong"}).status_code == 401
    assert client.get("/").status_code == 200


def test_every_token_can_be_revoked_whatever_page_is_shown(
    client: TestClient, sign_in: Sign, accounts: Accounts
) -> None:
    csrf = sign_in("olga")
    for number in range(51):
        accounts.issue_token(f"robot {number}", "viewer")
    told = {token.id for token in accounts.tokens()}
    for address in ("/access", "/access?page=2", "/access?page=2&sort=name"):
        page = client.get(address).text
        assert set(re.findall(r'<option value="(\w+)"', page)) == told
    last = client.get("/api/v1/access?page=2").json()["tables"]["tokens"]["rows"][0]["id"]
    form = {"csrf": csrf, "token": last, "reason": "it leaked"}
    assert client.post("/access/revoke", data=form).status_code == 303
    assert {token.id for token in accounts.tokens()} == told - {last}


def test_a_start_that_fails_is_told_and_leaves_the_name_free(
    client: TestClient,
    sign_in: Sign,
    runs: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path / "cache"))
    csrf = sign_in("olga")
    form = {"csrf": csrf, "scenario": "quickstart", "name": "again", "reason": "to try it"}
    wrong = client.post("/start", data=form | {"overrides": "raunds=3"})
    assert wrong.status_code == 409
    assert "rounds" in wrong.text  # the nearest name
    assert "raunds=3" in wrong.text
    assert not (runs / "again").exists()
    for model in ("/nowhere/at/all", "smollm2-135m-instruct"):
        absent = client.post("/start", data=form | {"overrides": f'base_model="{model}"'})
        assert absent.status_code == 409, "it has not been fetched, or is not there"
        assert model in absent.text.partition('role="alert"')[2].partition("</p>")[0]
        assert not (runs / "again").exists()
    # What only the run itself finds out: its job fails, and the name can be taken again.
    changes = f'base_model="{tiny_model_folder}"\ndata.source="/no/such/data.jsonl"'
    late = form | {"overrides": changes}
    jobs = client.app.state.site.jobs  # type: ignore[attr-defined]
    for _ in range(2):
        assert client.post("/start", data=late).status_code == 303
        for job in jobs._jobs:
            job.process.wait()
    assert [job["state"] for job in jobs.json()] == ["failed", "failed"]
    assert "/no/such/data.jsonl" in jobs.json()[0]["said"]


@pytest.mark.parametrize(
    ("action", "form", "said"),
    [
        ("next_round", {"quorum": "1.5"}, "quorum: write a whole number"),
        ("next_round", {"deadline_seconds": "soon"}, "deadline: write a number of seconds"),
        ("adopt_budget", {"epsilon": "3"}, "no noise"),
        ("make_coffee", {}, "no action"),
    ],
)
def test_a_refusal_says_what_is_wrong(
    client: TestClient, sign_in: Sign, runs: Path, action: str, form: dict[str, str], said: str
) -> None:
    stopped(runs / "mixed")
    answer = client.post(
        f"/runs/mixed/actions/{action}",
        data=form | {"csrf": sign_in("olga"), "reason": "why"},
        headers={"accept": "application/json"},
    )
    assert answer.status_code == 409
    assert said in answer.json()["error"]
    assert "is stopped" not in answer.json()["error"]


def test_a_form_that_is_broken_off_is_no_error(client: TestClient, sign_in: Sign) -> None:
    """As a second click does with the first one's."""
    sign_in("olga")
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    headers = {"host": "testserver", "cookie": cookie, "content-length": "99"}
    for path in ("/runs/mixed/actions/export", "/login", "/access/revoke"):
        scope = {
            "type": "http", "method": "POST", "path": path, "query_string": b"", "scheme": "https",
            "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        }  # fmt: skip
        parts = [{"type": "http.request", "body": b"reason=w", "more_body": True}]
        sent: list[Any] = []

        async def receive(parts: list[Any] = parts) -> Any:
            return parts.pop() if parts else {"type": "http.disconnect"}

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        anyio.run(client.app, scope, receive, send)
        assert sent[0]["status"] == 400
