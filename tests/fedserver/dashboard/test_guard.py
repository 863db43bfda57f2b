"""Every address is shut to strangers, every action to viewers; forms and sessions cannot be forged."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from typer.testing import CliRunner

from fedserver.control import ARGUMENTS, ControlQueue
from fedserver.dashboard.accounts import AccountError, Accounts
from fedserver.dashboard.application import make_application
from fedserver.dashboard.command import DashboardError, accounts_app, check_binding
from fedserver.dashboard.guard import COOKIE
from fedserver.ledger import Ledger

SignIn = Callable[[str], str]
ACT = "/runs/mixed/actions/export"
PASSWORD = "correct horse battery"


def addresses(client: TestClient) -> list[tuple[str, str]]:
    """Method and address of every route, with the run that exists put in."""
    values = {
        "run": "mixed",
        "round:int": "2",
        "view": "fleet",
        "table": "fleet",
        "action": "pause",
    }
    found = []
    for route in client.app.routes:  # type: ignore[attr-defined]
        if isinstance(route, Mount):
            continue
        assert isinstance(route, Route)
        path = re.sub(r"{([^}]+)}", lambda match: values[match.group(1)], route.path)
        found += [(method, path) for method in sorted(route.methods or ()) if method != "HEAD"]
    return found


def test_strangers_get_nothing_and_viewers_cannot_act(client: TestClient, sign_in: SignIn) -> None:
    known = addresses(client)
    assert len(known) > 20
    for method, path in known:
        answer = client.request(method, path, headers={"accept": "text/html"})
        if path.startswith("/login"):
            assert "mixed" not in answer.text
            continue
        assert answer.status_code == 401, (method, path)
        assert "mixed" not in answer.text.replace(path, "")
        assert client.request(method, path).status_code == 401
    csrf = sign_in("vera")
    for method, path in known:
        if method == "POST" and path not in ("/login", "/logout"):
            answer = client.post(path, data={"csrf": csrf, "reason": "because"})
            assert answer.status_code == 403, path
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("name", ["vera", "olga"])
def test_asking_for_headers_alone_does_nothing(
    name: str, client: TestClient, sign_in: SignIn, runs: Path
) -> None:
    """HEAD belongs to every address that can be opened; it carried a form past the guard once."""
    before = Ledger(runs / "mixed").head
    form = {"csrf": sign_in(name), "reason": "because", "kind": "merged", "round": "1"}
    for path in (
        *(f"/runs/mixed/actions/{action}" for action in ARGUMENTS),
        "/runs/mixed/ledger/replay",
        "/start",
        "/devices/invite",
        "/access/revoke",
        "/login",
    ):
        # Never what a form that was carried out answers: 201, 202, or the way to what was begun.
        answer = client.request("HEAD", path, data=form, headers={"accept": "application/json"})
        assert answer.status_code in (200, 303, 403), path
        assert "replay" not in answer.headers.get("location", "")
    assert not ControlQueue(runs / "mixed").requests()
    assert Ledger(runs / "mixed").head == before
    assert client.get("/").status_code == 200, "it did not sign out"


def test_addresses_out_of_all_bounds_are_nowhere(client: TestClient, sign_in: SignIn) -> None:
    sign_in("vera")
    assert client.get("/", headers={"host": "["}).status_code == 421
    for number in (10**20, 2**63 - 1):
        assert client.get(f"/runs/mixed/rounds/{number}").status_code == 404
        assert client.get(f"/api/v1/runs/mixed/rounds/{number}").status_code == 404
        assert client.get(f"/runs/mixed/rounds/{number}/replay").status_code == 404


@pytest.mark.parametrize("action", sorted(ARGUMENTS))
def test_actions_need_the_sessions_own_token(
    action: str, client: TestClient, sign_in: SignIn, runs: Path
) -> None:
    old = sign_in("olga")
    sign_in("olga")
    for data in ({}, {"csrf": ""}, {"csrf": "x"}, {"csrf": old}):
        path = f"/runs/mixed/actions/{action}"
        assert client.post(path, data={"reason": "why"} | data).status_code == 403
    assert client.post("/start", data={"reason": "why"}).status_code == 403
    assert client.post("/logout").status_code == 403
    assert not ControlQueue(runs / "mixed").requests()


def test_other_sites_and_other_names_of_this_host_are_turned_away(
    client: TestClient, sign_in: SignIn
) -> None:
    csrf = sign_in("olga")
    data = {"csrf": csrf, "reason": "why"}
    for site in ("cross-site", "same-site"):
        assert client.post(ACT, data=data, headers={"sec-fetch-site": site}).status_code == 403
        form = {"name": "olga", "password": "x"}
        assert client.post("/login", data=form, headers={"sec-fetch-site": site}).status_code == 403
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421


def test_session_fixation_a_cookie_is_new_after_signing_in_and_gone_after_signing_out(
    client: TestClient, sign_in: SignIn
) -> None:
    fixed = {"cookie": f"{COOKIE}=chosen-by-somebody-else"}
    form = {"name": "olga", "password": PASSWORD}
    given = client.post("/login", data=form, headers=fixed).cookies[COOKIE]
    assert client.get("/", headers=fixed).status_code == 401
    sign_in("olga")
    first = client.cookies[COOKIE]
    assert len({first, given, "chosen-by-somebody-else"}) == 3
    csrf = sign_in("olga")
    second = client.cookies[COOKIE]
    client.cookies.clear()
    # Signing in over a session ends it.
    assert client.get("/", headers={"cookie": f"{COOKIE}={first}"}).status_code == 401
    held = {"cookie": f"{COOKIE}={second}"}
    assert client.get("/", headers=held).status_code == 200
    assert client.post("/logout", data={"csrf": csrf}, headers=held).status_code == 303
    assert client.get("/", headers=held).status_code == 401


def test_cookies_and_pages_are_locked_down(client: TestClient, sign_in: SignIn) -> None:
    answer = client.post("/login", data={"name": "olga", "password": PASSWORD})
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith("__host-")
    for word in ("httponly", "secure", "samesite=strict", "path=/"):
        assert word in cookie
    for path in ("/", "/runs/mixed", "/static/dashboard.js", "/login", "/nowhere"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    page = client.get("/runs/mixed").text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page)


def test_an_account_is_locked_after_failures_and_an_unknown_name_tells_nothing(
    runs: Path, accounts: Accounts
) -> None:
    now = [1000.0]
    accounts = Accounts(runs, now=lambda: now[0])
    messages = set()
    for name in ("olga", "nobody"):
        for _ in range(6):
            with pytest.raises(Exception, match="wrong") as caught:
                accounts.sign_in(name, "guess")
            messages.add(str(caught.value))
    assert len(messages) == 1
    with pytest.raises(Exception, match="locked"):
        accounts.sign_in("olga", PASSWORD)
    now[0] += 16 * 60
    cookie = accounts.sign_in("olga", PASSWORD)
    assert accounts.session(cookie) is not None
    now[0] += 1.5 * 3600
    assert accounts.session(cookie, used=False) is not None
    # A page that was left open is no use of the session.
    now[0] += 1.5 * 3600
    assert accounts.session(cookie, used=False) is None
    assert accounts.session(cookie) is None


@pytest.mark.parametrize("change", ["remove", "password", "role", "remove and add", "file gone"])
def test_a_command_that_changes_an_account_ends_its_sessions_in_a_server_that_runs(
    client: TestClient, sign_in: SignIn, runs: Path, change: str
) -> None:
    sign_in("vera")
    others = client.cookies[COOKIE]
    client.cookies.clear()
    csrf = sign_in("olga")
    file = runs / ".dashboard" / "accounts.db"
    # As if nobody had changed the file for long.
    os.utime(file, ns=(1, 1))
    assert client.get("/").status_code == 200
    command = Accounts(runs)
    if "remove" in change:
        command.remove("olga")
    if change == "password":
        command.add("olga", "operator", "another long password")
    if change == "role":
        command.add("olga", "viewer", PASSWORD)
    if "add" in change:
        command.add("olga", "operator", PASSWORD)
    if change == "file gone":
        file.unlink()
    assert client.post(ACT, data={"csrf": csrf, "reason": "spite"}).status_code == 401
    assert client.get("/").status_code == 401
    held = {"cookie": f"{COOKIE}={others}"}
    client.cookies.clear()
    status = 401 if change == "file gone" else 200
    assert client.get("/", headers=held).status_code == status
    if change in ("role", "remove and add"):
        sign_in("olga")
        assert client.get("/").status_code == 200


def test_an_invitation_signs_in_once(runs: Path) -> None:
    accounts = Accounts(runs)
    word = accounts.invite()
    assert accounts.accept("other") is None
    assert accounts.accept(word)
    assert accounts.accept(word) is None
    assert accounts.accept("") is None


def test_the_terminals_link_and_its_session_end_with_the_first_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedserver.dashboard.accounts.SCRYPT_N", 16)
    accounts = Accounts(tmp_path)
    client = TestClient(
        make_application(tmp_path, accounts, hosts=["testserver"]),
        base_url="https://testserver",
        follow_redirects=False,
    )
    answer = client.get("/login", params={"invitation": accounts.invite()})
    assert answer.status_code == 303
    assert client.get("/start").status_code == 200
    word = accounts.invite()
    # By a command, in another process.
    Accounts(tmp_path).add("vera", "viewer", PASSWORD)
    assert client.get("/start").status_code == 401
    answer = client.get("/login", params={"invitation": word})
    assert answer.status_code == 401
    assert "first account" in answer.text
    Accounts(tmp_path).remove("vera")
    assert client.get("/login", params={"invitation": word}).status_code == 401


def test_tokens_are_listed_without_their_secret_and_revoked(
    client: TestClient, sign_in: SignIn, accounts: Accounts, runs: Path
) -> None:
    held = {"authorization": f"Bearer {accounts.issue_token('prometheus', 'viewer')}"}
    other = {"authorization": f"Bearer {accounts.issue_token('robot', 'operator')}"}
    assert client.get("/metrics", headers=held).status_code == 200
    assert client.get("/access", headers=held).status_code == 403
    assert client.get("/api/v1/access/tokens.csv", headers=held).status_code == 403
    sign_in("vera")
    assert client.get("/access").status_code == 403
    client.cookies.clear()
    csrf = sign_in("olga")
    told = client.get("/api/v1/access").json()["tables"]
    by_name = {row["name"]: row for row in told["tokens"]["rows"]}
    assert by_name["prometheus"]["used"] is not None
    assert by_name["robot"]["used"] is None
    page = client.get("/access").text
    for bearer in (held, other):
        assert bearer["authorization"].split()[1] not in page + str(told)
    form = {"csrf": csrf, "token": by_name["prometheus"]["id"], "reason": ""}
    refused = client.post("/access/revoke", data=form)
    assert refused.status_code == 409
    assert client.post("/access/revoke", data=form | {"reason": "leaked"}).status_code == 303
    assert client.post("/access/revoke", data=form | {"reason": "twice"}).status_code == 409
    client.cookies.clear()
    assert client.get("/metrics", headers=held).status_code == 401
    assert client.get("/metrics", headers=other).status_code == 200
    # By a command, in another process.
    Accounts(runs).revoke_token(by_name["robot"]["id"][:6], reason="not needed")
    assert client.get("/metrics", headers=other).status_code == 401
    lines = [(line.action, line.who, line.reason) for line in accounts.record()[:3]]
    assert lines == [
        ("revoke token", "terminal", "not needed"),
        ("revoke token", "olga", "leaked"),
        ("issue token", "terminal", ""),
    ]
    for wrong in ("", "nothing"):
        with pytest.raises(AccountError, match="no token"):
            accounts.revoke_token(wrong)


def test_commands_list_and_revoke_tokens(runs: Path) -> None:
    command = CliRunner()
    token = command.invoke(accounts_app, ["token", str(runs), "prometheus"]).stdout.strip()
    assert Accounts(runs).bearer(token) is not None
    listed = command.invoke(accounts_app, ["tokens", str(runs)]).stdout
    identity, name, role, made, used = listed.strip().split("\t")
    assert (name, role) == ("prometheus", "viewer")
    assert made <= used
    assert token not in listed
    assert command.invoke(accounts_app, ["revoke", str(runs), identity]).exit_code == 0
    assert Accounts(runs).bearer(token) is None
    assert command.invoke(accounts_app, ["tokens", str(runs)]).stdout == ""


def test_a_program_acts_by_its_token_without_a_cookie(
    client: TestClient, accounts: Accounts, runs: Path
) -> None:
    for role, status in (("viewer", 403), ("operator", 202)):
        bearer = {"authorization": f"Bearer {accounts.issue_token('robot', role)}"}
        assert client.get("/api/v1/runs", headers=bearer).json()["runs"] == 1
        answer = client.post(
            "/runs/mixed/actions/export",
            data={"reason": "nightly", "kind": "merged"},
            headers=bearer | {"accept": "application/json"},
        )
        assert answer.status_code == status
    assert client.get("/api/v1/runs", headers={"authorization": "Bearer x"}).status_code == 401
    for job in client.app.state.site.jobs._jobs:  # type: ignore[attr-defined]
        job.process.wait()
    ledger = Ledger(runs / "mixed")
    entry = ledger.last("operator")
    assert entry is not None
    assert (entry.content["action"], entry.content["who"]) == ("export", "robot")
    assert ledger.verify() == []
    ledger.close()


def test_addresses_beside_loopback_need_tls_and_an_account(runs: Path, tmp_path: Path) -> None:
    pair = tmp_path / "pem"
    for host in ("0.0.0.0", "192.0.2.7", "::", "example.org"):
        with pytest.raises(DashboardError, match="loopback"):
            check_binding(runs, host, None, None, Accounts(runs))
        with pytest.raises(DashboardError, match="account"):
            check_binding(runs, host, pair, pair, Accounts(tmp_path))
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        check_binding(runs, host, None, None, Accounts(runs))


def test_where_one_goes_after_signing_in_is_this_server(
    client: TestClient, sign_in: SignIn
) -> None:
    for wanted in ("//evil.example", "https://evil.example", "/\\evil.example", "\t//evil.example"):
        form = {"name": "olga", "password": PASSWORD, "wanted": wanted}
        assert client.post("/login", data=form).headers["location"] == "/"


def test_hostile_names_and_lines_stay_text(runs: Path, accounts: Accounts) -> None:
    """What nodes and logs say is escaped in HTML, and not computed by a spreadsheet."""
    import json
    import sqlite3

    evil = "<img src=x onerror=alert(1)>\"'\u202e=2+5"
    folder = runs / "mixed"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        for node in row["nodes"]:
            node |= {"node": evil + node["node"], "reason": "=HYPERLINK(1)" + evil}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "events.jsonl").open("a") as file:
        notice = {"time": 1.0, "event": "notice", "level": evil, "text": evil, "node": evil}
        file.write(json.dumps(notice) + "\n")
    database = sqlite3.connect(folder / "ledger.db")
    database.execute("UPDATE entries SET content = replace(content, 'clinic', '<b>clinic')")
    database.commit()
    database.close()
    (runs / "<b>x").mkdir()
    shutil_copy = (folder / "live.json").read_text().replace("mixed", "<script>alert(1)</script>")
    (runs / "<b>x" / "live.json").write_text(shutil_copy)
    application = make_application(runs, accounts, hosts=["testserver"])
    with TestClient(application, base_url="https://testserver") as client:
        client.post("/login", data={"name": "olga", "password": PASSWORD})
        client.cookies.set(COOKIE, accounts.open_session("olga", "operator"))
        views = (
            "",
            "/rounds",
            "/rounds/1",
            "/fleet",
            "/plan",
            "/privacy",
            "/robustness",
            "/ledger",
        )
        paths = ["/", *(f"/runs/mixed{view}" for view in views), "/runs/mixed/log"]
        paths += ["/runs/mixed/control", "/compare?run=mixed&run=%3Cb%3Ex", "/runs/%3Cb%3Ex"]
        for path in [*paths, "/runs/mixed/ledger/verify"]:
            page = client.get(path, headers={"accept": "text/html"}).text
            for word in ("<img src=x", "<b>", "<script>", "\u202e"):
                assert word not in page, path
        table = client.get("/api/v1/runs/mixed/robustness/influence.csv").text
        assert "'=HYPERLINK" in table
