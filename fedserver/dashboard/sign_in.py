"""Signing in and out: by a local account, by the terminal's link, by an OpenID provider."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from fedserver.dashboard import oidc
from fedserver.dashboard.accounts import AccountError, Accounts
from fedserver.dashboard.guard import COOKIE, StaleForm, fields_of, form_of
from fedserver.dashboard.html import render
from fedserver.dashboard.oidc import Provider
from fedserver.dashboard.page import NotThere

NOT_SHOWN = ("csrf", "password", "wanted")
"""Fields of a form that are nothing somebody typed for a page."""
PROVIDER_THREADS = 4
"""Anybody may begin to sign in; so many threads wait for the provider, and none of those of pages."""


class SignIn:
    """The handlers; where one goes afterwards is always this server."""

    def __init__(self, accounts: Accounts, provider: Provider | None) -> None:
        self.accounts = accounts
        self.provider = provider
        self._waiting = CapacityLimiter(PROVIDER_THREADS)
        self._hashing = CapacityLimiter(1)

    def routes(self) -> list[Route]:
        """Their addresses."""
        return [
            Route("/login", self.login, methods=["GET", "POST"]),
            Route(oidc.START, self.begin_oidc),
            Route(oidc.CALLBACK, self.finish_oidc),
            Route("/logout", self.logout, methods=["POST"]),
        ]

    async def login(self, request: Request) -> Response:
        """The form, what it sends, and the link that a terminal printed."""
        wanted = request.scope.get("wanted", "")
        if request.method == "HEAD":
            return Response()
        if request.method == "GET":
            cookie = self.accounts.accept(request.query_params.get("invitation", ""))
            if cookie is not None:
                return _signed_in(cookie, "/")
            problem = ""
            if "invitation" in request.query_params:
                problem = "This link has been used, or is of another start of the dashboard."
                if self.accounts.names():
                    problem = "The terminal's link ended when the first account was made."
            typed: dict[str, str] = {}
            if request.scope.get("unsent"):
                problem = "You were signed out, and nothing was done. Sign in, and send it again."
                try:
                    typed = await fields_of(request)
                except ValueError:
                    problem = "You were signed out, and nothing was done."
            status = 401 if wanted or problem else 200
            return self._login_page(request, problem, wanted, status, typed=typed)
        form: dict[str, str] = {}
        try:
            # Who signs in over an old session cannot have its token.
            form = await fields_of(request)
            # Passwords are hashed one at a time; who tries many must not keep pages waiting.
            cookie = await to_thread.run_sync(
                self.accounts.sign_in,
                form.get("name", ""),
                form.get("password", ""),
                limiter=self._hashing,
            )
        except AccountError as error:
            name = form.get("name", "")
            return self._login_page(request, str(error), form.get("wanted", ""), 401, name)
        except ValueError as error:
            return self._login_page(request, str(error), "", 400)
        self.accounts.sign_out(request.scope["cookie"])
        return _signed_in(cookie, _own_path(form.get("wanted", "")))

    async def begin_oidc(self, request: Request) -> Response:
        """Off to the OpenID provider."""
        if self.provider is None:
            raise NotThere("no OpenID provider is configured here")
        wanted = _own_path(request.query_params.get("wanted", ""))
        here = str(request.base_url)
        try:
            address, attempt = await to_thread.run_sync(
                self.provider.begin, wanted, here, limiter=self._waiting
            )
        except AccountError as error:
            return self._login_page(request, str(error), wanted, 502)
        answer = RedirectResponse(address, 303)
        # Lax: the way back begins at the provider's page.
        answer.set_cookie(
            oidc.COOKIE, attempt, max_age=int(oidc.ATTEMPT_SECONDS), path="/", secure=True,
            httponly=True, samesite="lax",
        )  # fmt: skip
        return answer

    async def finish_oidc(self, request: Request) -> Response:
        """Back from the OpenID provider, with a code or with a refusal."""
        if self.provider is None:
            raise NotThere("no OpenID provider is configured here")
        query = request.query_params
        finish = partial(
            self.provider.finish,
            query.get("state", ""),
            query.get("code", ""),
            request.cookies.get(oidc.COOKIE, ""),
            error=query.get("error", ""),
            description=query.get("error_description", ""),
        )
        try:
            who = await to_thread.run_sync(finish, limiter=self._waiting)
        except AccountError as error:
            return self._login_page(request, str(error), "", 401)
        self.accounts.sign_out(request.scope["cookie"])
        # A redirect would still be of the provider's making, and the strict cookie not sent with it.
        html = render("arrived.html.jinja", session=None, target=who.wanted or "/")
        answer = HTMLResponse(html)
        _set_session(answer, self.accounts.open_session(who.name, who.role))
        answer.delete_cookie(oidc.COOKIE, path="/", secure=True, httponly=True, samesite="lax")
        return answer

    async def logout(self, request: Request) -> Response:
        """End the session."""
        try:
            await form_of(request)
        except (StaleForm, ValueError):
            session, words = request.scope["session"], "You are still signed in"
            html = render(
                "missing.html.jinja", session=session, title="Not signed out", words=words
            )
            return HTMLResponse(html, 403)
        self.accounts.sign_out(request.scope["cookie"])
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="strict")
        return answer

    def _login_page(
        self,
        request: Request,
        problem: str,
        wanted: str,
        status: int,
        name: str = "",
        typed: Mapping[str, str] | None = None,
    ) -> Response:
        shown = {
            key.replace("_", " ").capitalize(): value
            for key, value in (typed or {}).items()
            if key not in NOT_SHOWN and value.strip()
        }
        html = render(
            "login.html.jinja",
            session=request.scope["session"],
            problem=problem,
            typed=shown,
            name=name,
            wanted=_own_path(wanted),
            has_accounts=bool(self.accounts.names()),
            provider=self.provider.title if self.provider else "",
            begin=oidc.START,
        )
        return HTMLResponse(html, status)


def _signed_in(cookie: str, target: str) -> Response:
    answer = RedirectResponse(target or "/", 303)
    _set_session(answer, cookie)
    return answer


def _set_session(answer: Response, cookie: str) -> None:
    answer.set_cookie(COOKIE, cookie, path="/", secure=True, httponly=True, samesite="strict")


def _own_path(wanted: str) -> str:
    """An address of this server, "" for anything that could lead elsewhere."""
    safe = wanted.startswith("/") and not wanted.startswith(("//", "/\\", "/login", "/logout"))
    return wanted if safe and wanted.isprintable() and "\\" not in wanted else ""
