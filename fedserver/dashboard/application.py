"""The web application: what is at which address."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fedserver.dashboard import devices, library_views, openapi
from fedserver.dashboard.access_view import access
from fedserver.dashboard.accounts import LOOPBACK, Accounts
from fedserver.dashboard.actions import Desk
from fedserver.dashboard.answers import API, Answers, question_of
from fedserver.dashboard.exposition import CONTENT_TYPE, Exposition
from fedserver.dashboard.forms import Forms
from fedserver.dashboard.guard import Guard
from fedserver.dashboard.html import compile_templates, render
from fedserver.dashboard.jobs import Jobs
from fedserver.dashboard.library import Library
from fedserver.dashboard.measurements import MEASURED, ROBUSTNESS, MeasurementPages, Measurements
from fedserver.dashboard.oidc import Provider
from fedserver.dashboard.page import NotThere, Page, Question, run_address
from fedserver.dashboard.registry import BY_NAME, ROUND, VIEWS, View
from fedserver.dashboard.replays import Replays
from fedserver.dashboard.run_reader import REPORT, RunReader
from fedserver.dashboard.sign_in import SignIn
from fedserver.dashboard.streams import Channels, version
from fedserver.dashboard.vendor import VendorError, missing
from fedserver.dashboard.verifications import VerificationError, Verifications

STATIC = Path(__file__).resolve().parent / "static"


def make_application(
    root: Path,
    accounts: Accounts,
    *,
    hosts: Sequence[str] | None = LOOPBACK,
    provider: Provider | None = None,
) -> Starlette:
    """The dashboard of all runs below ``root``. ``provider``: who else may say who somebody is.

    Raises:
        VendorError: the browser libraries have not been fetched.
    """
    if absent := missing():
        raise VendorError(
            f"the dashboard lacks {absent[0]}: fetch it with python -m fedserver.dashboard.vendor"
        )
    library = Library(root)
    # The first look at a thousand runs takes longer than any later one.
    library.rows()
    compile_templates()
    site = Site(library, accounts, provider)
    application = Starlette(
        routes=site.routes(),
        middleware=[Middleware(Guard, accounts=accounts, hosts=hosts)],
        exception_handlers={
            404: _not_found,
            NotThere: _not_found,
            ClientDisconnect: _broken_off,
        },
    )
    application.state.site = site
    return application


class Site(Answers):
    """The handlers, over one library of runs."""

    def __init__(self, library: Library, accounts: Accounts, provider: Provider | None) -> None:
        super().__init__(library, Jobs(library.root))
        self.accounts = accounts
        self.sign_in = SignIn(accounts, provider)
        self.channels = Channels()
        self.meters = library_views.Meters()
        self.exposition = Exposition(library)
        self.replays = Replays(self.jobs)
        self.forms = Forms(Desk(library, self.jobs), accounts, self.replays)
        self.verifications = Verifications()
        self.measurements = Measurements(self.jobs)
        self.measurement_pages = MeasurementPages(library, self.jobs, self.measurements)

    def routes(self) -> list[Route | Mount]:
        """Every address."""
        run = "/runs/{run}"
        return [
            Mount("/static", StaticFiles(directory=STATIC), name="static"),
            *self.sign_in.routes(),
            *self.forms.routes(),
            *self.measurement_pages.routes(),
            Route("/", self.runs),
            Route("/metrics", self.metrics),
            Route("/compare", self.compare),
            Route("/devices", self.devices),
            Route("/access", self.access),
            Route("/server", self.server),
            Route("/stream", self.library_stream),
            Route(f"{run}", self.run_view),
            Route(f"{run}/stream", self.run_stream),
            Route(f"{run}/ledger/verify", self.verify),
            Route(f"{run}/rounds/{{round:int}}", self.one_round),
            Route(f"{run}/rounds/{{round:int}}/replay", self.replay),
            Route(f"{run}/report.html", self.report),
            Route(f"{run}/{{view}}", self.run_view),
            Route(f"{API}/openapi.json", self.document),
            Route(f"{API}/runs", self.runs),
            Route(f"{API}/runs.csv", self.runs),
            Route(f"{API}/compare", self.compare),
            Route(f"{API}/compare/{{table}}.csv", self.compare),
            Route(f"{API}/devices", self.devices),
            Route(f"{API}/devices/{{table}}.csv", self.devices),
            Route(f"{API}/access", self.access),
            Route(f"{API}/access/{{table}}.csv", self.access),
            Route(f"{API}/server", self.server),
            Route(f"{API}/server/{{table}}.csv", self.server),
            Route(f"{API}{run}/ledger/verify", self.verify),
            Route(f"{API}{run}/rounds/{{round:int}}", self.one_round),
            Route(f"{API}{run}/rounds/{{round:int}}/replay", self.replay),
            Route(f"{API}{run}/rounds/{{round:int}}/{{table}}.csv", self.one_round),
            Route(f"{API}{run}/{{view}}", self.run_view),
            Route(f"{API}{run}/{{view}}/{{table}}.csv", self.run_view),
        ]

    async def runs(self, request: Request) -> Response:
        """All runs."""
        if request.url.path == "/":
            alone = await run_in_threadpool(self.library.alone)
            if alone is not None:
                return RedirectResponse(run_address(alone), 303)
        question = question_of(request)
        shown = version(await run_in_threadpool(self._stamp))
        page = await run_in_threadpool(library_views.runs, self.library, question)
        return self.answer(request, page, "runs.html.jinja", "runs", stream="/stream", shown=shown)

    async def compare(self, request: Request) -> Response:
        """Runs over each other."""
        question = question_of(request)
        page = await run_in_threadpool(library_views.compare, self.library, question)
        return self.answer(request, page, "compare.html.jinja")

    async def server(self, request: Request) -> Response:
        """The machine; of given runs the jobs."""
        question = question_of(request)
        page = await run_in_threadpool(
            library_views.server,
            self.library,
            self.channels.viewers,
            self.jobs.json(*question.runs),
            self.meters,
            question,
        )
        return self.answer(request, page, "server.html.jinja")

    async def access(self, request: Request) -> Response:
        """Accounts and tokens, for operators."""
        page = await run_in_threadpool(access, self.accounts, question_of(request))
        return self.answer(request, page, "access.html.jinja")

    async def devices(self, request: Request) -> Response:
        """Who has joined the deployment, and who may."""
        page = await run_in_threadpool(devices.devices, self.library.root, question_of(request))
        session = request.scope["session"]
        if session.made is not None and (request.method, request.url.path) == ("GET", "/devices"):
            made, session.made = session.made, None
            return HTMLResponse(self.page(request, page, "devices.html.jinja", made=made))
        return self.answer(request, page, "devices.html.jinja")

    async def replay(self, request: Request) -> Response:
        """How far the replay of a round is, and what it gave."""
        run = await run_in_threadpool(self.reader, request)
        page = await run_in_threadpool(self.replays.page, run, question_of(request).round)
        return self.answer(request, page, "replay.html.jinja", view=ROUND)

    async def report(self, request: Request) -> Response:
        """The run's report as a file: a page of its own, which this server's policy is not for."""
        run = await run_in_threadpool(self.reader, request)
        path = run.folder / REPORT
        if not path.is_file():
            raise NotThere("the run has no report yet: fedbraid export report writes one")
        name = re.sub(r"[^A-Za-z0-9._-]", "-", run.identity)
        return FileResponse(path, media_type="text/html", filename=f"{name}-report.html")

    async def run_view(self, request: Request) -> Response:
        """One view of one run."""
        name = request.path_params.get("view", "")
        view = BY_NAME.get("" if name == "live" else name)
        if view is None or (name == "live" and not request.url.path.startswith(API)):
            raise NotThere(f"there is no view {name!r}")
        return await self._run_page(request, view)

    async def one_round(self, request: Request) -> Response:
        """One round of one run."""
        return await self._run_page(request, ROUND)

    async def _run_page(self, request: Request, view: View) -> Response:
        run = await run_in_threadpool(self.reader, request)
        # Before the page is made: what changes meanwhile is a change to it.
        shown = version(await run_in_threadpool(run_stamp(run)))
        question = question_of(request)
        if view.name == ROBUSTNESS:
            measured = await run_in_threadpool(self.measurements.told, run)
            question = replace(question, measured=measured)
        page = await run_in_threadpool(view.make, run, question)
        kind = "?live=1" if view.name == "" else ""
        stream = f"{run_address(run.identity)}/stream{kind}"
        answer = self.answer(request, page, view.template, view=view, stream=stream, shown=shown)
        if (
            request.headers.get("hx-target") == MEASURED
            and question.measured["state"] == "finished"
        ):
            # The page asked how far it was; now its table has more columns.
            answer.headers["hx-trigger"] = "run-changed"
        return answer

    async def verify(self, request: Request) -> Response:
        """Hash everything again."""
        run = await run_in_threadpool(self.reader, request)
        try:
            found = await self.verifications.verify(run.folder)
        except VerificationError as error:
            return PlainTextResponse(str(error), 503)
        page = Page({"run": run.identity, **found})
        return self.answer(request, page, "verify.html.jinja")

    async def run_stream(self, request: Request) -> Response:
        """Events of a run's pages: what the live view shows, or only that something has changed."""
        run = await run_in_threadpool(self.reader, request)
        live = request.query_params.get("live") == "1"

        def payload() -> dict[str, Any]:
            return live_payload(run) if live else {"changed": True}

        channel = self.channels.channel(
            "live" if live else "run", run.identity, run_stamp(run), payload
        )
        return self._stream(request, channel.messages)

    async def library_stream(self, request: Request) -> Response:
        """Events of the list of runs."""
        channel = self.channels.channel("library", "", self._stamp, lambda: {"changed": True})
        return self._stream(request, channel.messages)

    async def metrics(self, request: Request) -> Response:
        """What Prometheus scrapes, with a bearer token."""
        text = await run_in_threadpool(self.exposition.text, self.channels.viewers)
        return Response(text, media_type=CONTENT_TYPE)

    async def document(self, request: Request) -> Response:
        """The OpenAPI document."""
        return JSONResponse(openapi.document(VIEWS, ROUND))

    def _stream(
        self, request: Request, messages: Callable[[Callable[[], bool]], AsyncIterator[bytes]]
    ) -> Response:
        cookie, token = request.scope["cookie"], request.scope["token"]
        bearer = request.scope["bearer"]

        def alive() -> bool:
            if bearer:
                return self.accounts.bearer(token) is not None
            return self.accounts.session(cookie, used=False) is not None

        return StreamingResponse(
            messages(alive),
            media_type="text/event-stream",
            headers={"x-accel-buffering": "no"},
        )

    def _stamp(self) -> Any:
        return [(row["run"], row["state"], row["changed"]) for row in self.library.rows()]


def run_stamp(run: RunReader) -> Callable[[], Any]:
    """What changes with a run; that its process has gone changes no file."""

    def stamp() -> Any:
        return run.stamp(), run.live().get("state")

    return stamp


def live_payload(run: RunReader) -> dict[str, Any]:
    """The parts of the live view that change, as HTML by element id, and what its charts draw."""
    page = BY_NAME[""].make(run, Question())
    context: dict[str, Any] = {"table": page.tables["arrivals"], "data": page.data}
    return {
        "fragments": {
            name: render(f"parts/{name}.html.jinja", **context)
            for name in ("standing", "phase", "tiles", "arrivals")
        },
        "charts": page.data["curves"] | {"rollbacks": page.data["rollbacks"]},
        "data": {k: v for k, v in page.data.items() if k != "curves"},
    }


def _broken_off(request: Request, error: Exception) -> Response:
    """Of a form that a browser did not send to its end: nobody waits for an answer."""
    return Response(status_code=400)


def _not_found(request: Request, error: Exception) -> Response:
    words = str(error) if isinstance(error, NotThere) else "there is nothing at this address"
    if request.url.path.startswith(API):
        return JSONResponse({"error": words}, 404)
    session = request.scope.get("session")
    html = render("missing.html.jinja", session=session, title="Not found", words=words)
    return HTMLResponse(html, 404)
