"""Signing in by an OpenID provider: authorisation code flow with PKCE, state and nonce (OpenID Connect
Core 1.0, section 3.1; RFC 7636). Authlib speaks OAuth; joserfc, its sister, checks the signed ID token.

Who may do what is decided here, by a mapping from a claim to roles: a provider knows people, not this
dashboard. A state is of one browser, of one attempt, and of ten minutes.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedserver.dashboard.accounts import LOOPBACK, OPERATOR, VIEWER, AccountError

CALLBACK = "/login/oidc/callback"
START = "/login/oidc"
COOKIE = "__Host-fedbraid-oidc"
DISCOVERY = "/.well-known/openid-configuration"
# Signatures by a key that only the provider has: none, and none that our own secret could make.
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"]
ATTEMPT_SECONDS = 600.0
MOST_ATTEMPTS = 1000
LEEWAY_SECONDS = 60
TIMEOUT_SECONDS = 10.0
KEYS_SECONDS = 30.0
"""Unknown keys are looked for at the provider no more often than this."""


class OidcSettings(BaseModel):
    """A provider as ``--oidc FILE`` names it. Who has neither role is not let in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    issuer: str
    client_id: str = Field(min_length=1)
    secret_file: str = ""
    """File of the client's secret, beside this one; "" for a public client."""
    claim: str = "groups"
    """The claim of the ID token whose values stand in the mapping."""
    operators: tuple[str, ...] = ()
    viewers: tuple[str, ...] = ()
    scope: str = "openid profile email"
    title: str = ""
    """What the button says that it signs in with; by default the issuer's host."""
    address: str = ""
    """Where browsers find this dashboard, if not where its requests say."""


def read_settings(path: Path) -> tuple[OidcSettings, str]:
    """A provider's settings and the client's secret.

    Raises:
        AccountError: the file cannot be read, or says what cannot work; with what to do.
    """
    try:
        found = OidcSettings(**tomllib.loads(path.read_text(encoding="utf-8")))
        secret = ""
        if found.secret_file:
            secret = (path.parent / found.secret_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise AccountError(f"{error.filename}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise AccountError(f"{path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise AccountError(f"{path}: {key}: {first['msg']}") from None
    if not _private(found.issuer):
        raise AccountError(f"{path}: issuer: write an https address")
    if not found.operators and not found.viewers:
        raise AccountError(
            f"{path}: name the values of the claim {found.claim!r} that make operators or viewers"
        )
    return found, secret


@dataclass(frozen=True)
class Attempt:
    """Somebody who was sent to the provider. ``browser``: what its cookie holds."""

    browser: str
    nonce: str
    verifier: str
    wanted: str
    callback: str
    began: float


@dataclass(frozen=True)
class Identity:
    """Who has come back: the name that stands in ledgers, the role, and where they were going."""

    name: str
    role: str
    wanted: str


class Provider:
    """One OpenID provider. Its addresses and keys are fetched when they are first needed."""

    def __init__(
        self, settings: OidcSettings, secret: str, *, now: Callable[[], float] = time.time
    ) -> None:
        self.settings = settings
        self._secret = secret
        self._now = now
        self._lock = threading.Lock()
        self._attempts: dict[str, Attempt] = {}
        self._addresses: dict[str, str] = {}
        self._keys: Any = None
        self._keys_fetched = float("-inf")

    @property
    def title(self) -> str:
        """What the button says."""
        return self.settings.title or str(urlsplit(self.settings.issuer).hostname)

    def begin(self, wanted: str, here: str) -> tuple[str, str]:
        """The provider's address for a new attempt, and the cookie that binds it to this browser.

        ``here``: this server's address as the browser called it.

        Raises:
            AccountError: the provider cannot be reached or says nonsense.
        """
        callback = (self.settings.address or here).rstrip("/") + CALLBACK
        attempt = Attempt(
            secrets.token_urlsafe(32),
            secrets.token_urlsafe(32),
            secrets.token_urlsafe(64),
            wanted,
            callback,
            self._now(),
        )
        endpoint = self._address("authorization_endpoint")
        with self._session(callback) as session:
            address, state = session.create_authorization_url(
                endpoint, code_verifier=attempt.verifier, nonce=attempt.nonce
            )
        with self._lock:
            for old in [s for s, a in self._attempts.items() if self._over(a)]:
                del self._attempts[old]
            while len(self._attempts) >= MOST_ATTEMPTS:
                del self._attempts[next(iter(self._attempts))]
            self._attempts[state] = attempt
        return address, attempt.browser

    def finish(self, state: str, code: str, browser: str) -> Identity:
        """Who has come back from the provider with a code.

        Raises:
            AccountError: not this browser's attempt, an ID token that is not sound, or no role here.
        """
        with self._lock:
            attempt = self._attempts.pop(state, None)
        if attempt is None or self._over(attempt) or not code:
            raise AccountError("this sign-in was not begun here, or took too long: try again")
        if not hmac.compare_digest(browser.encode(), attempt.browser.encode()):
            raise AccountError("this sign-in was begun in another browser: try again")
        claims = self._claims(self._id_token(code, attempt), attempt.nonce)
        role = self._role(claims)
        if role is None:
            raise AccountError(
                f"{self.title} knows you, but none of your {self.settings.claim} has a role here"
            )
        return Identity(self._name(claims), role, attempt.wanted)

    def _id_token(self, code: str, attempt: Attempt) -> str:
        import requests
        from authlib.common.errors import AuthlibBaseError

        try:
            with self._session(attempt.callback) as session:
                answer = session.fetch_token(
                    self._address("token_endpoint"),
                    grant_type="authorization_code",
                    code=code,
                    code_verifier=attempt.verifier,
                    timeout=TIMEOUT_SECONDS,
                    allow_redirects=False,
                )
        except (AuthlibBaseError, requests.RequestException, ValueError) as error:
            raise AccountError(f"{self.title} refused the sign-in: {_line(error)}") from None
        token = answer.get("id_token")
        if not isinstance(token, str):
            raise AccountError(f"{self.title} sent no ID token; is the scope openid?")
        return token

    def _claims(self, token: str, nonce: str) -> dict[str, Any]:
        from joserfc import jwt
        from joserfc.errors import JoseError

        wanted = self.settings
        rules = jwt.JWTClaimsRegistry(
            now=lambda: int(self._now()),
            leeway=LEEWAY_SECONDS,
            iss={"essential": True, "value": wanted.issuer},
            sub={"essential": True},
            aud={"essential": True, "value": wanted.client_id},
            exp={"essential": True},
            iat={"essential": True},
            nonce={"essential": True, "value": nonce},
        )
        try:
            try:
                found = jwt.decode(token, self._key_set(), algorithms=ALGORITHMS)
            except (JoseError, ValueError):
                # The provider may have changed its keys since they were fetched.
                if not self._forget_keys():
                    raise
                found = jwt.decode(token, self._key_set(), algorithms=ALGORITHMS)
            rules.validate(found.claims)
        except (JoseError, ValueError) as error:
            raise AccountError(
                f"the ID token of {self.title} is not sound: {_line(error)}"
            ) from None
        claims: dict[str, Any] = found.claims
        audience = claims["aud"]
        several = isinstance(audience, list) and len(audience) > 1
        if (several or "azp" in claims) and claims.get("azp") != wanted.client_id:
            raise AccountError(f"the ID token of {self.title} is for another program")
        return claims

    def _role(self, claims: dict[str, Any]) -> str | None:
        told = claims.get(self.settings.claim)
        values = {told} if isinstance(told, str) else set()
        if isinstance(told, list):
            values = {value for value in told if isinstance(value, str)}
        if values & set(self.settings.operators):
            return OPERATOR
        return VIEWER if values & set(self.settings.viewers) else None

    def _name(self, claims: dict[str, Any]) -> str:
        """A name for people, and what identifies the person; no local account can have such a name."""
        shown = next(
            (claims[k] for k in ("preferred_username", "email") if isinstance(claims.get(k), str)),
            "",
        )
        identity = f"{claims['sub']} at {urlsplit(self.settings.issuer).hostname}"
        return _line(f"{shown[:64]} ({identity})" if shown else f"({identity})")

    def _session(self, callback: str) -> Any:
        from authlib.integrations.requests_client import OAuth2Session

        return OAuth2Session(
            self.settings.client_id,
            self._secret or None,
            token_endpoint_auth_method="client_secret_basic" if self._secret else "none",
            scope=self.settings.scope,
            redirect_uri=callback,
            code_challenge_method="S256",
        )

    def _address(self, key: str) -> str:
        if not self._addresses:
            found = self._fetch(self.settings.issuer.rstrip("/") + DISCOVERY)
            if found.get("issuer") != self.settings.issuer:
                raise AccountError(f"{self.title} calls itself {_line(found.get('issuer'))}")
            self._addresses = {k: v for k, v in found.items() if isinstance(v, str)}
        address = self._addresses.get(key, "")
        if not _private(address):
            raise AccountError(f"{self.title} has no {key} by https")
        return address

    def _key_set(self) -> Any:
        from joserfc.jwk import KeySet

        if self._keys is None:
            found = self._fetch(self._address("jwks_uri"))
            self._keys = KeySet.import_key_set(found)  # type: ignore[arg-type]
            self._keys_fetched = self._now()
        return self._keys

    def _forget_keys(self) -> bool:
        if self._now() - self._keys_fetched < KEYS_SECONDS:
            return False
        self._keys = None
        return True

    def _fetch(self, address: str) -> dict[str, Any]:
        import requests

        try:
            answer = requests.get(address, timeout=TIMEOUT_SECONDS, allow_redirects=False)
            found = answer.json() if answer.status_code == 200 else None
        except (requests.RequestException, ValueError):
            found = None
        if not isinstance(found, dict):
            raise AccountError(f"{self.title} does not answer at {address}: try again later")
        return found

    def _over(self, attempt: Attempt) -> bool:
        return self._now() - attempt.began > ATTEMPT_SECONDS


def _private(address: str) -> bool:
    """Whether nobody on the way can read or change it."""
    parts = urlsplit(address)
    return bool(parts.hostname) and (
        parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
    )


def _line(value: object) -> str:
    """A text of another machine as one short line."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())[:200]
