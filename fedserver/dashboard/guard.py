"""The one door of the web application: who asks, may they, and what a browser may do with the answer."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request, cookie_parser
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedserver.dashboard import oidc
from fedserver.dashboard.accounts import Accounts, Session
from fedserver.dashboard.html import render

COOKIE = "__Host-fedbraid"
STATIC = "/static/"
OPERATORS = ("/access", "/api/v1/access")
"""What only operators may see, with all below it."""
PUBLIC = ("/login", oidc.START, oidc.CALLBACK)
LARGEST_BODY = 1 << 16
ACTS = "a viewer may look; an operator acts"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """ASGI middleware: host, credentials and role before any handler; headers after it."""

    def __init__(self, app: ASGIApp, accounts: Accounts, hosts: Sequence[str] | None) -> None:
        """``hosts``: names that a request may call this server by; None: any (behind TLS)."""
        self._app = app
        self._accounts = accounts
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on with ``scope["session"]``."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = scope["path"]

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for key, value in HEADERS.items():
                    answer[key] = value
                if not path.startswith(STATIC):
                    answer["cache-control"] = "no-store"
            await send(message)

        refusal = self._refusal(scope, headers, path)
        if refusal is not None:
            await refusal(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)

    def _refusal(self, scope: Scope, headers: Headers, path: str) -> Response | None:
        host = _host_of(headers)
        if self._hosts is not None and host not in self._hosts:
            # A foreign name that resolves to this machine is somebody else's page at work.
            return PlainTextResponse("this server is not known by that name", 421)
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        session = self._accounts.session(cookie)
        kind, _, token = headers.get("authorization", "").partition(" ")
        scope["bearer"] = False
        if session is None and kind.lower() == "bearer":
            session = self._accounts.bearer(token.strip())
            scope["bearer"] = session is not None
        scope["session"], scope["cookie"], scope["token"] = session, cookie, token.strip()
        own = headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
        public = path in PUBLIC or path.startswith(STATIC)
        if session is None and not public:
            if scope["method"] in ("GET", "POST") and wants_page(headers):
                # What a form held is shown to who sent it from here, and to nobody else's visitors.
                scope["unsent"] = scope["method"] == "POST" and own
                scope["path"], scope["wanted"], scope["method"] = "/login", _address(scope), "GET"
                return None
            return refusal(headers, "sign in first", 401)
        acts = scope["method"] not in ("GET", "HEAD")
        if acts and not own:
            return PlainTextResponse("an action comes from this server's own pages", 403)
        below = (path.rstrip("/") + "/").startswith(tuple(f"{one}/" for one in OPERATORS))
        if below and session is not None and not session.may_act:
            return refusal(headers, "an operator's account is needed to see this", 403, session)
        everybodys = path in ("/login", "/logout")
        if acts and not everybodys and (session is None or not session.may_act):
            return refusal(headers, ACTS, 403, session)
        return None


def wants_page(headers: Headers) -> bool:
    """Whether a browser asks, and not a program."""
    return "text/html" in headers.get("accept", "")


def refusal(headers: Headers, words: str, status: int, session: Session | None = None) -> Response:
    """Why somebody is turned away: a page for a browser, JSON for who asks for it, else a line."""
    if wants_page(headers):
        html = render("missing.html.jinja", session=session, title="Not allowed", words=words)
        return HTMLResponse(html, status)
    challenge = {"www-authenticate": 'Bearer realm="fedbraid"'} if status == 401 else None
    if "application/json" in headers.get("accept", ""):
        return JSONResponse({"error": words}, status, challenge)
    return PlainTextResponse(words, status, challenge)


def _host_of(headers: Headers) -> str:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


class StaleForm(PermissionError):
    """A form that is not of the session that sends it; ``fields`` are what was typed."""

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__(
            "the form was of another session; look at what you typed, and send it again"
        )
        self.fields = {key: value for key, value in fields.items() if key != "csrf"}


async def fields_of(request: Request) -> dict[str, str]:
    """What a form holds, whoever sent it. Raises ValueError for one that is too long or none."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise ValueError("the form is too long")
    return {k: v[-1] for k, v in parse_qs(body.decode(), keep_blank_values=True).items()}


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a form, each once, of at most ``LARGEST_BODY`` bytes.

    Raises:
        StaleForm: the form does not hold the session's CSRF token.
        ValueError: the body is too long or not a form.
    """
    fields = await fields_of(request)
    session: Session | None = request.scope["session"]
    if session is not None and not request.scope["bearer"]:
        sent = fields.get("csrf") or request.headers.get("x-csrf-token", "")
        if not hmac.compare_digest(sent.encode(), session.csrf.encode()):
            raise StaleForm(fields)
    return fields


async def operators_form(request: Request) -> dict[str, str]:
    """The fields of a form that acts, as of ``form_of``. Raises HTTPException for who may not act."""
    session: Session | None = request.scope["session"]
    if request.method != "POST" or session is None or not session.may_act:
        raise HTTPException(403, ACTS)
    return await form_of(request)


def _address(scope: Scope) -> str:
    path: str = scope["path"]
    query = scope["query_string"].decode("ascii", "replace")
    return path + (f"?{query}" if query else "")
