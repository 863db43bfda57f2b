"""Signing in by an OpenID provider that really signs: what is sound is let in, nothing else is."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.testclient import TestClient

from fedserver.dashboard.accounts import AccountError, Accounts
from fedserver.dashboard.application import make_application
from fedserver.dashboard.command import DashboardError, check_binding
from fedserver.dashboard.guard import COOKIE
from fedserver.dashboard.oidc import CALLBACK, Provider, read_settings

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
    held = httpx.Cookies(visitor.cookies)
    visitor.cookies.clear()
    assert visitor.get(back).status_code == 401
    # Who has the address alone takes nothing from who has the cookie.
    visitor.cookies = held
    assert visitor.get(back.replace("state=", "state=x")).status_code == 401
    assert visitor.get(back).status_code == 200
    visitor.cookies = held
    assert "used already" in visitor.get(back).text
    old, held = go(visitor), httpx.Cookies(visitor.cookies)
    back = go(visitor)
    assert visitor.get(old).status_code == 401
    visitor.cookies = held
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


def test_many_who_begin_take_nothing_from_one_who_comes_back(
    settings_file: Path, issuer: Any
) -> None:
    import requests

    now = [time.time()]
    provider = Provider(*read_settings(settings_file), now=lambda: now[0])
    here = "https://testserver/"
    address, held = provider.begin("/runs/mixed", here)
    for _ in range(1001):
        provider.begin("/" + "x" * 10_000, here)
    answer = requests.get(address, allow_redirects=False, timeout=10)
    back = parse_qs(urlsplit(answer.headers["location"]).query)
    state, code = back["state"][0], back["code"][0]
    who = provider.finish(state, code, held)
    assert (who.role, who.wanted) == ("viewer", "/runs/mixed")
    with pytest.raises(AccountError, match="used already"):
        provider.finish(state, code, held)
    now[0] += 601
    with pytest.raises(AccountError, match="too long"):
        provider.finish(state, code, held)
    with pytest.raises(AccountError, match="not begun here"):
        Provider(*read_settings(settings_file)).finish(state, code, held)


def test_the_cookie_of_an_attempt_fits_and_can_be_neither_read_nor_changed(
    settings_file: Path, issuer: Any
) -> None:
    provider = Provider(*read_settings(settings_file))
    here = "https://dashboard.example.org/"
    for wanted in ("/" + "x" * 1023, "/" + "ü" * 511, "/" + "x" * 1024):
        address, cookie = provider.begin(wanted, here)
        assert len(cookie) < 2500
        asked = parse_qs(urlsplit(address).query)
        inside = base64.urlsafe_b64decode(cookie)
        for secret in (asked["nonce"][0], asked["state"][0], "verifier", "xxxx"):
            assert secret.encode() not in inside
        for changed in (cookie[:-8] + "AAAAAA==", cookie[8:], "", "\xfc"):
            with pytest.raises(AccountError, match="not begun here"):
                provider.finish(asked["state"][0], "code", changed)


def test_a_silent_provider_is_asked_once_in_a_while_by_one(
    settings_file: Path, issuer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.time()]
    provider = Provider(*read_settings(settings_file), now=lambda: now[0])
    asked: list[int] = []
    right = issuer.discovery

    def silent() -> Any:
        asked.append(1)
        return "nonsense"

    def attempt(_: int) -> str:
        try:
            return provider.begin("", "https://testserver/")[0]
        except AccountError as error:
            return str(error)

    monkeypatch.setattr(issuer, "discovery", silent)
    with ThreadPoolExecutor(8) as pool:
        told = set(pool.map(attempt, range(24)))
    assert len(told) == 1
    assert "does not answer" in told.pop()
    assert len(asked) == 1
    monkeypatch.setattr(issuer, "discovery", right)
    assert "does not answer" in attempt(0)
    now[0] += 10.5
    assert attempt(0).startswith(issuer.address)


@pytest.mark.parametrize(
    ("claims", "name"),
    [
        ({"preferred_username": "boss (42 at idp.example)"}, "boss 42 at idp.example (u-17 at {})"),
        ({"preferred_username": "b" * 300, "sub": "s" * 128}, "b" * 64 + " (" + "s" * 128 + " at {})"),
        ({"preferred_username": ")("}, "(u-17 at {})"),
        ({"sub": "s" * 255}, "olga (sha256:" + sha256(b"s" * 255).hexdigest() + " at {})"),
        ({"sub": "a  b"}, "olga (sha256:" + sha256(b"a  b").hexdigest() + " at {})"),
        ({"sub": "1) (2"}, "olga (sha256:" + sha256(b"1) (2").hexdigest() + " at {})"),
        ({"sub": "sha256:ab"}, "olga (sha256:" + sha256(b"sha256:ab").hexdigest() + " at {})"),
    ],
)  # fmt: skip
def test_the_name_in_ledgers_is_one_identity_whatever_a_person_calls_itself(
    visitor: TestClient, issuer: Any, claims: dict[str, str], name: str
) -> None:
    issuer.change = lambda told: told | claims
    assert visitor.get(go(visitor)).status_code == 200
    session = visitor.app.state.site.accounts.session(visitor.cookies[COOKIE])  # type: ignore[attr-defined]
    assert session.name == name.format("localhost")


@pytest.mark.parametrize(
    ("verified", "status"), [(True, 200), (False, 401), ("true", 401), (None, 401)]
)
def test_a_role_by_email_needs_a_verified_one(
    settings_file: Path, runs: Path, issuer: Any, verified: Any, status: int
) -> None:
    text = settings_file.read_text().replace('["lab"]', '["olga@example.org"]')
    settings_file.write_text(text + 'claim = "email"\n')
    told = {"email": "olga@example.org"} | (
        {} if verified is None else {"email_verified": verified}
    )
    issuer.change = lambda claims: claims | told
    provider = Provider(*read_settings(settings_file))
    application = make_application(runs, Accounts(runs), hosts=["testserver"], provider=provider)
    with TestClient(application, base_url="https://testserver", follow_redirects=False) as client:
        answer = client.get(go(client))
    assert answer.status_code == status
    assert ("not verified" in answer.text) == (status == 401)


def test_what_a_provider_says_instead_of_a_code_is_shown_to_who_began(visitor: TestClient) -> None:
    refused = {"error": "access_denied", "error_description": "<b>ask\u202e\nthe lab</b>"}
    state = parse_qs(urlsplit(go(visitor)).query)["state"][0]
    assert "access_denied" not in visitor.get(CALLBACK, params=refused | {"state": "x"}).text
    answer = visitor.get(CALLBACK, params=refused | {"state": state})
    assert answer.status_code == 401
    assert "access_denied: &lt;b&gt;ask the lab&lt;/b&gt;" in answer.text
    visitor.cookies.clear()
    answer = visitor.get(CALLBACK, params=refused | {"state": state})
    assert "not begun here" in answer.text
    assert "access_denied" not in answer.text
