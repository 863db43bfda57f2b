"""Enrolment tokens from the dashboard: shown once, recorded, usable once, and only in a deployment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from starlette.testclient import TestClient

from fedhost.enrolment import EnrolmentRefused, JoinRequest, Token
from fedserver.dashboard import devices
from fedserver.dashboard.accounts import OPERATOR, VIEWER, Accounts, Session
from fedserver.dashboard.application import make_application
from fedserver.dashboard.guard import COOKIE
from fedserver.dashboard.page import Question
from fedserver.deployment.folder import ServerFolder
from fedserver.deployment.invitation import invite as make
from fedserver.deployment.registry import Registry
from fedserver.ledger import Ledger, LedgerError
from fedserver.statements import open_seal

WHY = "a laptop for the school"


@pytest.fixture
def deployment(finished_run: Path, tmp_path: Path) -> ServerFolder:
    folder = ServerFolder(tmp_path / "server")
    folder.prepare({"listen": "127.0.0.1:8443"})
    shutil.copytree(finished_run, folder.path / "runs" / "mixed")
    return folder


@pytest.fixture(params=["", "runs"])
def root(request: pytest.FixtureRequest, deployment: ServerFolder) -> Path:
    """The deployment is served itself, or by its runs."""
    return deployment.path / request.param


@pytest.fixture
def visitor(root: Path) -> Iterator[Callable[[str], tuple[TestClient, str]]]:
    accounts = Accounts(root)
    application = make_application(root, accounts, hosts=["testserver"])
    with TestClient(application, base_url="https://testserver") as client:

        def sign_in(role: str) -> tuple[TestClient, str]:
            cookie = accounts.open_session(f"a-{role}", role)
            client.cookies.set(COOKIE, cookie)
            session = accounts.session(cookie)
            assert session is not None
            return client, session.csrf

        yield sign_in


def join(folder: ServerFolder, token: str) -> str:
    """What the enrolment service does with a device's request, its signatures apart."""
    key = generate_private_key(SECP256R1()).public_key()
    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    request = JoinRequest(
        secret=Token.parse(token).secret.hex(),
        transport_key=pem.decode(),
        update_key="ab" * 32,
        transport_signature="00" * 32,
        update_signature="00" * 64,
    )
    registry = Registry(folder.registry)
    try:
        return registry.redeem(request, now=0.0).name
    finally:
        registry.close()


def test_a_token_is_shown_once_recorded_and_lets_one_device_join(
    visitor: Callable[[str], tuple[TestClient, str]], deployment: ServerFolder, root: Path
) -> None:
    client, csrf = visitor(OPERATOR)
    form = {"csrf": csrf, "name": "school laptop", "hours": "2", "reason": WHY}
    # Whoever loads the page again that shows a token issues no other one.
    answer = client.post(
        "/devices/invite", data=form, headers={"accept": "text/html"}, follow_redirects=False
    )
    assert (answer.status_code, answer.headers["location"]) == (303, "/devices")
    client.head("/devices")
    client.get("/api/v1/devices")
    html = client.get("/devices", headers={"accept": "text/html"})
    assert html.headers["cache-control"] == "no-store"
    assert "--token " in html.text
    assert "--token " not in client.get("/devices", headers={"accept": "text/html"}).text
    answer = client.post("/devices/invite", data=form, headers={"accept": "application/json"})
    token = answer.json()["token"]
    assert (
        answer.json()["command"] == f"fedbraid client join https://127.0.0.1:8443 --token {token}"
    )
    ledger = Ledger(deployment.runs / ".dashboard" / "ledger")
    entries = list(ledger.entries())
    assert ledger.verify() == []
    ledger.close()
    assert [entry.content["arguments"] for entry in entries] == [
        {"node": "school laptop", "hours": 2.0}
    ] * 2
    assert {(e.content["action"], e.content["who"], e.content["reason"]) for e in entries} == {
        ("invite", "a-operator", WHY)
    }
    first = html.text.partition("--token ")[2].partition("<")[0]
    for path in ("/devices", "/api/v1/devices", "/api/v1/devices/invitations.csv", "/server"):
        told = client.get(path, headers={"accept": "text/html"}).text
        for secret in (first, token, Token.parse(token).secret.hex()):
            assert secret not in told
    for file in (deployment.runs / ".dashboard").rglob("*"):
        if file.is_file():
            assert token.encode() not in file.read_bytes()
    # The second one of that name has made the first void.
    with pytest.raises(EnrolmentRefused, match="no invitation"):
        join(deployment, first)
    assert join(deployment, token) == "school laptop"
    with pytest.raises(EnrolmentRefused):
        join(deployment, token)
    again = client.post("/devices/invite", data=form, headers={"accept": "application/json"})
    assert again.status_code == 409
    assert "joined already" in again.json()["error"]
    tables = client.get("/api/v1/devices").json()["tables"]
    assert [row["name"] for row in tables["joined"]["rows"]] == ["school laptop"]
    assert tables["invited"]["total"] == 0
    assert tables["invitations"]["total"] == 2


def test_it_needs_an_operator_a_reason_a_name_and_the_sessions_token(
    visitor: Callable[[str], tuple[TestClient, str]], deployment: ServerFolder
) -> None:
    client, csrf = visitor(VIEWER)
    good = {"csrf": csrf, "name": "school", "reason": WHY}
    assert client.post("/devices/invite", data=good).status_code == 403
    client, csrf = visitor(OPERATOR)
    assert client.post("/devices/invite", data=good).status_code == 403
    good["csrf"] = csrf
    for wrong in (
        {"reason": " "},
        {"name": ""},
        {"name": "<b>"},
        {"name": "x" * 65},
        {"hours": "-1"},
        {"hours": "nan"},
        {"hours": "soon"},
        {"hours": "1e9"},
    ):
        assert client.post("/devices/invite", data=good | wrong).status_code == 409, wrong
    assert client.get("/api/v1/devices").json()["tables"]["invitations"]["total"] == 0
    # Where nothing can be recorded, no token is made.
    held = Ledger(deployment.runs / ".dashboard" / "ledger", create=True)
    assert client.post("/devices/invite", data=good).status_code == 409
    held.close()
    assert client.get("/api/v1/devices").json()["tables"]["invited"]["total"] == 0


def test_a_deployment_has_one_set_of_accounts_and_one_record_however_it_is_served(
    deployment: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedserver.dashboard.accounts.SCRYPT_N", 16)
    Accounts(deployment.path).add("olga", OPERATOR, "a long password")
    monkeypatch.chdir(deployment.runs)
    for root in (deployment.path, deployment.runs, Path()):
        assert Accounts(root).names() == [("olga", OPERATOR)]
    who = Session("olga", OPERATOR)
    for number, root in enumerate((deployment.path, deployment.runs)):
        devices.invite(root, {"name": f"n{number}", "reason": WHY}, who)
    for root in (deployment.path, deployment.runs):
        page = devices.devices(root, Question())
        assert [row["arguments"] for row in page.tables["invitations"].rows] == [
            "hours 24.0, node n1",
            "hours 24.0, node n0",
        ]
    assert not (deployment.path / ".dashboard").exists()


def test_what_cannot_be_read_is_a_warning_and_not_nothing(
    visitor: Callable[[str], tuple[TestClient, str]], deployment: ServerFolder
) -> None:
    client, csrf = visitor(OPERATOR)
    form = {"csrf": csrf, "name": "school", "reason": WHY}
    html = {"accept": "text/html"}
    assert "Nobody has invited" in client.get("/devices", headers=html).text
    assert "--token " in client.post("/devices/invite", data=form, headers=html).text
    page = client.get("/devices", headers=html).text
    assert "fedbraid server invite</code> prints are not recorded" in page
    assert client.get("/api/v1/devices").json()["problems"] == []
    record = deployment.runs / ".dashboard" / "ledger" / "ledger.db"
    for file in (record, deployment.registry):
        for beside in file.parent.glob(f"{file.name}-*"):
            beside.unlink()
        file.write_bytes(b"damaged" * 1000)
        answer = client.get("/devices", headers=html)
        assert answer.status_code == 200
        assert str(file) in answer.text
        assert "Nobody has invited" not in answer.text
        assert client.post("/devices/invite", data=form, headers=html).status_code == 409
    settings = deployment.path / "server.toml"
    settings.write_text("listen = \n")
    answer = client.get("/devices", headers=html)
    assert answer.status_code == 200
    assert str(settings) in answer.text
    assert len(client.get("/api/v1/devices").json()["problems"]) == 3


def test_only_the_token_that_could_not_be_recorded_is_void(
    deployment: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile: list[str] = []

    def append(*told: object, **more: object) -> None:
        meanwhile.append(make(deployment, "school", 1.0).token)
        raise LedgerError("the disk is full")

    monkeypatch.setattr(devices.recording, "append", append)
    who = Session("olga", OPERATOR)
    with pytest.raises(LedgerError):
        devices.invite(deployment.path, {"name": "school", "reason": WHY}, who)
    assert join(deployment, meanwhile[0]) == "school"


def test_runs_alone_are_no_deployment_and_the_page_says_so(
    client: TestClient, sign_in: Callable[[str], str]
) -> None:
    csrf = sign_in("olga")
    page = client.get("/devices", headers={"accept": "text/html"}).text
    assert "No deployment" in page
    assert "/devices/invite" not in page
    form = {"csrf": csrf, "name": "school", "reason": WHY}
    answer = client.post("/devices/invite", data=form, headers={"accept": "application/json"})
    assert answer.status_code == 409
    assert "no deployment" in answer.json()["error"]


def test_what_is_recorded_in_a_deployments_run_is_sealed_by_the_deployments_key(
    visitor: Callable[[str], tuple[TestClient, str]], deployment: ServerFolder
) -> None:
    folder = deployment.path / "runs" / "ended"
    ledger = Ledger(folder, create=True, key_file=deployment.sealing_key)
    ledger.append("genesis", 0, {"configuration": {}}, {})
    ledger.append("round", 1, {"nodes": [], "state": "", "view_rank": 1}, {})
    ledger.close()
    shutil.rmtree(folder / "keys", ignore_errors=True)
    row = {"round": 1, "head": "", "bytes_up": 0, "bytes_down": 0, "seconds": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row | {"accepted": 0, "rejected": 0}) + "\n")
    client, csrf = visitor(OPERATOR)
    name = next(n for n in client.app.state.site.library.folders(anew=True) if "ended" in n)  # type: ignore[attr-defined]
    form = {"csrf": csrf, "reason": WHY}
    answer = client.post(
        f"/runs/{name}/actions/export", data=form, headers={"accept": "application/json"}
    )
    assert answer.status_code == 202, answer.text
    for job in client.app.state.site.jobs._jobs:  # type: ignore[attr-defined]
        job.process.wait()
    ledger = Ledger(folder)
    entries = list(ledger.entries())
    ledger.close()
    assert [entry.kind for entry in entries] == ["genesis", "round", "operator"]
    assert entries[-1].content["reason"] == WHY
    assert entries[-1].content["outcome"] == "failed"  # there is no model in that run
    assert len({open_seal(entry.seal).key for entry in entries}) == 1


@pytest.mark.parametrize("root", [""], indirect=True)
def test_a_run_that_is_started_here_is_made_among_the_runs(
    visitor: Callable[[str], tuple[TestClient, str]],
    deployment: ServerFolder,
    tiny_model_folder: Path,
) -> None:
    """Its data are missing, so it ends at once, and its job is that of the run's name in the list."""
    client, csrf = visitor(OPERATOR)
    before = sorted(deployment.path.iterdir())
    changes = f'base_model="{tiny_model_folder}"\ndata.source="/no/such/data.jsonl"'
    form = {"csrf": csrf, "scenario": "quickstart", "name": "again", "reason": WHY}
    html = client.get("/start", headers={"accept": "text/html"}).text
    assert f"in <code>{deployment.runs}</code>" in html
    answer = client.post("/start", data=form | {"overrides": changes}, follow_redirects=False)
    assert answer.status_code == 303
    (job,) = client.app.state.site.jobs._jobs  # type: ignore[attr-defined]
    assert str(deployment.runs / "again") in job.process.args
    assert job.run == "runs:again"
    job.process.wait()
    assert sorted(deployment.path.iterdir()) == before
