"""Signing in by an OpenID provider that really signs: what is sound is let in, nothing else is."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.testclient import TestClient

from fedserver.dashboard.accounts import AccountError, Accounts
from fedserver.dashboard.application import make_application
from fedserver.dashboard.command import DashboardError, check_binding
from fedserver.dashboard.guard import COOKIE
from fedserver.dashboard.oidc import Provider, read_settings

CLIENT, SECRET = "dashboard", "the client's secret"
Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def issuer(openid_issuer: Any) -> Any:
    openid_issuer.change, openid_issuer.sign = (lambda claims: claims), openid_issuer.signed
    openid_issuer.groups = ["lab"]
    openid_issuer.problems.clear()
    return openid_issuer


@pytest.fixture
def settings_file(issuer: Any, tmp_path: Path) -> Path:
    (tmp_path / "client.secret").write_text(SECRET + "\n")
    file = tmp_path / "oidc.toml"
    file.write_text(
        f'issuer = "{issuer.address}"\nclient_id = "{CLIENT}"\nsecret_file = "client.secret"\n'
        'operators = ["admins"]\nviewers = ["lab"]\n'
    )
    return file


@pytest.fixture
def visitor(settings_file: Path, runs: Path) -> Iterator[TestClient]:
    provider = Provider(*read_settings(settings_file))
    application = make_application(runs, Accounts(runs), hosts=["testserver"], provider=provider)
    with TestClient(application, base_url="https://testserver", follow_redirects=False) as found:
        yield found


def go(client: TestClient, wanted: str = "/runs/mixed") -> str:
    """To the provider and to where it sends the browser back, which is returned."""
    import requests

    sent = client.get("/login/oidc", params={"wanted": wanted})
    assert sent.status_code == 303
    answer = requests.get(sent.headers["location"], allow_redirects=False, timeout=10)
    return answer.headers["location"].removeprefix("https://testserver")


@pytest.mark.parametrize(
    ("groups", "role"),
    [
        (["lab"], "viewer"),
        ("lab", "viewer"),
        (["lab", "admins"], "operator"),
        (["x"], None),
        (7, None),
    ],
)
def test_who_the_provider_knows_has_the_role_of_the_mapping(
    visitor: TestClient, issuer: Any, groups: Any, role: str | None
) -> None:
    issuer.groups = groups
    answer = visitor.get(go(visitor))
    assert issuer.problems == []
    if role is None:
        assert answer.status_code == 401
        assert COOKIE not in visitor.cookies
        return
    assert answer.status_code == 200
    assert 'content="0; url=/runs/mixed"' in answer.text
    cookie = answer.headers["set-cookie"].lower()
    for word in ("httponly", "secure", "samesite=strict"):
        assert word in cookie
    session = visitor.app.state.site.accounts.session(visitor.cookies[COOKIE])  # type: ignore[attr-defined]
    assert (session.name, session.role) == ("olga (u-17 at localhost)", role)
    page = visitor.get("/runs/mixed/control", headers={"accept": "text/html"}).text
    assert ("stands in the ledger" in page) == (role == "operator")


def hmac_by_public_key(issuer: Any) -> Callable[[dict[str, Any]], str]:
    public = issuer.key.as_pem(private=False)

    def sign(claims: dict[str, Any]) -> str:
        head = {"alg": "HS256", "kid": "one"}
        parts = [
            base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")
            for part in (head, claims)
        ]
        import hmac

        made = hmac.digest(public, b".".join(parts), "sha256")
        return b".".join([*parts, base64.urlsafe_b64encode(made).rstrip(b"=")]).decode()

    return sign


def unsigned(claims: dict[str, Any]) -> str:
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
        for part in ({"alg": "none"}, claims)
    ]
    return ".".join([*parts, ""])


def without(key: str) -> Change:
    return lambda claims: {k: v for k, v in claims.items() if k != key}


@pytest.mark.parametrize(
    "change",
    [
        lambda claims: claims | {"nonce": "another"},
        without("nonce"),
        lambda claims: claims | {"aud": "another program"},
        lambda claims: claims | {"aud": [CLIENT, "another program"]},
        lambda claims: claims | {"azp": "another program"},
        without("aud"),
        lambda claims: claims | {"iss": "https://evil.example"},
        lambda claims: claims | {"exp": int(time.time()) - 3600},
        without("exp"),
        without("sub"),
        lambda claims: claims | {"iat": int(time.time()) + 3600},
    ],
)
def test_a_token_with_a_wrong_claim_lets_nobody_in(
    visitor: TestClient, issuer: Any, change: Change
) -> None:
    issuer.change = change
    answer = visitor.get(go(visitor))
    assert answer.status_code == 401
    assert COOKIE not in visitor.cookies


@pytest.mark.parametrize("kind", ["none", "hmac", "other key", "cut", "words"])
def test_a_token_that_the_provider_did_not_sign_lets_nobody_in(
    visitor: TestClient, issuer: Any, kind: str
) -> None:
    other = RSAKey.generate_key(2048, {"kid": "one"})
    issuer.sign = {
        "none": unsigned,
        "hmac": hmac_by_public_key(issuer),
        "other key": lambda claims: jwt.encode({"alg": "RS256", "kid": "one"}, claims, other),
        "cut": lambda claims: issuer.signed(claims)[:-9],
        "words": lambda claims: "not a token",
    }[kind]
    answer = visitor.get(go(visitor))
    assert answer.status_code == 401
    assert COOKIE not in visitor.cookies


def test_an_attempt_is_of_one_browser_and_used_once(visitor: TestClient, issuer: Any) -> None:
    back = go(visitor)
    held = dict(visitor.cookies)
    visitor.cookies.clear()
    assert visitor.get(back).status_code == 401
    visitor.cookies.update(held)
    # The attempt was used up by whoever came first.
    assert visitor.get(back).status_code == 401
    back = go(visitor)
    assert visitor.get(back.replace("state=", "state=x")).status_code == 401
    assert visitor.get(back).status_code == 200
    assert visitor.get(back).status_code == 401
    assert visitor.get("/login/oidc/callback?error=access_denied&state=x").status_code == 401
    for wanted in ("//evil.example", "https://evil.example"):
        assert "evil" not in visitor.get(go(visitor, wanted)).text


def test_changed_keys_are_fetched_again_and_a_silent_provider_is_one_line(
    settings_file: Path, runs: Path, issuer: Any
) -> None:
    now = [time.time()]
    provider = Provider(*read_settings(settings_file), now=lambda: now[0])
    application = make_application(runs, Accounts(runs), hosts=["testserver"], provider=provider)
    with TestClient(application, base_url="https://testserver", follow_redirects=False) as client:
        assert client.get(go(client)).status_code == 200
        issuer.key = RSAKey.generate_key(2048, {"kid": "one"})
        now[0] += 31
        assert client.get(go(client)).status_code == 200
    text = settings_file.read_text().replace(issuer.address, "http://127.0.0.1:9")
    settings_file.write_text(text)
    gone = Provider(*read_settings(settings_file))
    with pytest.raises(AccountError, match="does not answer"):
        gone.begin("", "https://testserver/")


def test_settings_that_cannot_be_safe_are_refused(
    settings_file: Path, runs: Path, tmp_path: Path
) -> None:
    good = settings_file.read_text()
    for wrong in (
        good.replace("http://localhost", "http://login.example.org"),
        good.replace("operators", "operatrs"),
        good.replace("client.secret", "absent"),
        'issuer = "https://a.example"\nclient_id = "x"\n',
        "issuer =",
    ):
        settings_file.write_text(wrong)
        with pytest.raises(AccountError):
            read_settings(settings_file)
    settings_file.write_text(good)
    provider = Provider(*read_settings(settings_file))
    pair = tmp_path / "pem"
    check_binding(runs, "0.0.0.0", pair, pair, Accounts(tmp_path), provider)
    with pytest.raises(DashboardError, match="loopback"):
        check_binding(runs, "0.0.0.0", None, None, Accounts(tmp_path), provider)
