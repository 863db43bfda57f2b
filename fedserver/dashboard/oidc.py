"""Signing in by an OpenID provider: authorisation code flow with PKCE, state and nonce (OpenID Connect
Core 1.0, section 3.1; RFC 7636). Authlib speaks OAuth; joserfc, its sister, checks the signed ID token.

Who may do what is decided here, by a mapping from a claim to roles: a provider knows people, not this
dashboard. A state is of one browser, of one attempt, and of ten minutes. The browser holds its attempt
itself, encrypted by a key of this process: whoever begins many takes no room from anybody else.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography.fernet import Fernet, InvalidToken
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedserver.dashboard.accounts import LOOPBACK, OPERATOR, VIEWER, AccountError

CALLBACK = "/login/oidc/callback"
START = "/login/oidc"
COOKIE = "__Host-fedbraid-oidc"
DISCOVERY = "/.well-known/openid-configuration"
# Signatures by a key that only the provider has: none, and none that our own secret could make.
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"]
ATTEMPT_SECONDS = 600.0
MOST_USED = 10_000
"""So many used states are remembered; after as many others the provider alone refuses a code again."""
LONGEST_WANTED = 1024
"""In bytes of UTF-8: proxies take 4096 of all headers, and encryption makes four of three."""
LEEWAY_SECONDS = 60
TIMEOUT_SECONDS = 10.0
KEYS_SECONDS = 30.0
"""Unknown keys are looked for at the provider no more often than this."""
SILENT_SECONDS = 10.0
"""For so long nobody asks a provider that has just not said where it is found."""
SUBJECT = re.compile(r"(?!sha256:)[!-'*-~]{1,128}")
"""Subjects that stand in names as they are: short, no space, no parenthesis. Of others the hash does."""


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
    """Somebody who was sent to the provider, as the browser's cookie holds it, encrypted."""

    state: str
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
        self._attempts = Fernet(Fernet.generate_key())
        self._lock = threading.Lock()
        self._used: dict[str, float] = {}
        self._asking = threading.Lock()
        self._silent: tuple[float, str] | None = None
        self._addresses: dict[str, str] = {}
        self._keys: Any = None
        self._keys_fetched = float("-inf")

    @property
    def title(self) -> str:
        """What the button says."""
        return self.settings.title or str(urlsplit(self.settings.issuer).hostname)

    def begin(self, wanted: str, here: str) -> tuple[str, str]:
        """The provider's address for a new attempt, and the cookie that binds it to this browser.

        ``here``: this server's address as the browser called it. ``wanted``: where the browser goes
        afterwards; forgotten where it is too long for a cookie.

        Raises:
            AccountError: the provider cannot be reached or says nonsense.
        """
        callback = (self.settings.address or here).rstrip("/") + CALLBACK
        nonce, verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(64)
        endpoint = self._address("authorization_endpoint")
        with self._session(callback) as session:
            address, state = session.create_authorization_url(
                endpoint, code_verifier=verifier, nonce=nonce
            )
        wanted = wanted if len(wanted.encode()) <= LONGEST_WANTED else ""
        attempt = Attempt(state, nonce, verifier, wanted, callback, self._now())
        text = json.dumps(asdict(attempt), ensure_ascii=False)
        return address, self._attempts.encrypt(text.encode()).decode()

    def finish(
        self, state: str, code: str, cookie: str, error: str = "", description: str = ""
    ) -> Identity:
        """Who has come back from the provider with a code.

        ``error``, ``description``: what the provider says instead of a code.

        Raises:
            AccountError: not this browser's attempt, the provider refused, an ID token that is not
                sound, or no role here.
        """
        attempt = self._attempt(cookie)
        if attempt is None or self._over(attempt):
            raise AccountError("this sign-in was not begun here, or took too long: try again")
        if not hmac.compare_digest(state.encode(), attempt.state.encode()):
            raise AccountError(
                "this sign-in is not the one that this browser began last: try again"
            )
        self._use(attempt)
        if error or not code:
            words = _line(f"{error}: {description}" if description else error) or "it sent no code"
            raise AccountError(f"{self.title} refused the sign-in: {words}")
        claims = self._claims(self._id_token(code, attempt), attempt.nonce)
        role = self._role(claims)
        if role is None:
            raise AccountError(
                f"{self.title} knows you, but none of your {self.settings.claim} has a role here"
            )
        return Identity(self._name(claims), role, attempt.wanted)

    def _attempt(self, cookie: str) -> Attempt | None:
        try:
            return Attempt(**json.loads(self._attempts.decrypt(cookie.encode())))
        except InvalidToken:
            return None

    def _use(self, attempt: Attempt) -> None:
        """Mark a state as used. Raises AccountError where it was."""
        with self._lock:
            for old in [state for state, until in self._used.items() if until < self._now()]:
                del self._used[old]
            if attempt.state in self._used:
                raise AccountError("this sign-in has been used already: try again")
            while len(self._used) >= MOST_USED:
                del self._used[next(iter(self._used))]
            self._used[attempt.state] = attempt.began + ATTEMPT_SECONDS

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
        if not isinstance(claims["sub"], str):
            raise AccountError(f"the ID token of {self.title} does not say who you are")
        if wanted.claim == "email" and claims.get("email_verified") is not True:
            raise AccountError(
                f"{self.title} has not verified your email address, so it has no role here"
            )
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
        """A name for people, and in parentheses what identifies the person, which is never cut.

        The name is the person's own choice, so it has no parentheses; no local account has any either.
        """
        shown = next(
            (claims[k] for k in ("preferred_username", "email") if isinstance(claims.get(k), str)),
            "",
        )
        shown = _line(shown.replace("(", " ").replace(")", " ")[:64])
        subject = claims["sub"]
        if not SUBJECT.fullmatch(subject):
            subject = "sha256:" + hashlib.sha256(subject.encode(errors="surrogatepass")).hexdigest()
        identity = f"({subject} at {urlsplit(self.settings.issuer).hostname})"
        return f"{shown} {identity}" if shown else identity

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
        # One asks; a failure is told to all who come within a while.
        with self._asking:
            if not self._addresses:
                if self._silent is not None and self._now() < self._silent[0]:
                    raise AccountError(self._silent[1])
                try:
                    self._addresses = self._discover()
                except AccountError as error:
                    self._silent = (self._now() + SILENT_SECONDS, str(error))
                    raise
        address = self._addresses.get(key, "")
        if not _private(address):
            raise AccountError(f"{self.title} has no {key} by https")
        return address

    def _discover(self) -> dict[str, str]:
        found = self._fetch(self.settings.issuer.rstrip("/") + DISCOVERY)
        if found.get("issuer") != self.settings.issuer:
            raise AccountError(f"{self.title} calls itself {_line(found.get('issuer'))}")
        return {k: v for k, v in found.items() if isinstance(v, str)}

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
