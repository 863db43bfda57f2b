"""The web application: addresses, and the three ways in which a view is written."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
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

from fedserver.control import ControlError
from fedserver.dashboard import actions, devices, library_views, openapi
from fedserver.dashboard.access_view import access
from fedserver.dashboard.accounts import LOOPBACK, AccountError, Accounts
from fedserver.dashboard.actions import Desk, scenario_names
from fedserver.dashboard.exposition import CONTENT_TYPE, Exposition
from fedserver.dashboard.guard import Guard, StaleForm, form_of
from fedserver.dashboard.html import compile_templates, render
from fedserver.dashboard.jobs import JobError, Jobs
from fedserver.dashboard.library import Library
from fedserver.dashboard.oidc import Provider
from fedserver.dashboard.page import NotThere, Page, Question, run_address
from fedserver.dashboard.registry import BY_NAME, ROUND, VIEWS, View
from fedserver.dashboard.replays import Replays
from fedserver.dashboard.run_reader import REPORT, RunReader
from fedserver.dashboard.sign_in import SignIn
from fedserver.dashboard.streams import Channels, version
from fedserver.dashboard.tables import Choice, to_csv
from fedserver.dashboard.vendor import VendorError, missing
from fedserver.dashboard.verifications import VerificationError, Verifications
from fedserver.ledger import LedgerError

if TYPE_CHECKING:
    from fedserver.deployment.invitation import Invitation

STATIC = Path(__file__).resolve().parent / "static"
API = "/api/v1"


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
        exception_handlers={404: _not_found, NotThere: _not_found},
    )
    application.state.site = site
    return application


class Site:
    """The handlers, over one library of runs."""

    def __init__(self, library: Library, accounts: Accounts, provider: Provider | None) -> None:
        self.library = library
        self.accounts = accounts
        self.sign_in = SignIn(accounts, provider)
        self.channels = Channels()
        self.meters = library_views.Meters()
        self.exposition = Exposition(library)
        self.desk = Desk(library, Jobs(library.root))
        self.replays = Replays(self.desk.jobs)
        self.verifications = Verifications()

    def routes(self) -> list[Route | Mount]:
        """Every address."""
        run = "/runs/{run}"
        return [
            Mount("/static", StaticFiles(directory=STATIC), name="static"),
            *self.sign_in.routes(),
            Route("/", self.runs),
            Route("/start", self.start, methods=["GET", "POST"]),
            Route("/metrics", self.metrics),
            Route("/compare", self.compare),
            Route("/devices", self.devices),
            Route("/devices/invite", self.invite, methods=["GET", "POST"]),
            Route("/access", self.access),
            Route("/access/revoke", self.revoke_token, methods=["GET", "POST"]),
            Route("/server", self.server),
            Route("/stream", self.library_stream),
            Route(f"{run}", self.run_view),
            Route(f"{run}/stream", self.run_stream),
            Route(f"{run}/ledger/verify", self.verify),
            Route(f"{run}/actions/{{action}}", self.act, methods=["GET", "POST"]),
            Route(f"{run}/rounds/{{round:int}}", self.one_round),
            Route(f"{run}/rounds/{{round:int}}/replay", self.replay),
            Route(f"{run}/ledger/replay", self.start_replay, methods=["GET", "POST"]),
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
            Route(f"{API}{run}/ledger/verify", self.verify),
            Route(f"{API}{run}/rounds/{{round:int}}", self.one_round),
            Route(f"{API}{run}/rounds/{{round:int}}/replay", self.replay),
            Route(f"{API}{run}/rounds/{{round:int}}/{{table}}.csv", self.one_round),
            Route(f"{API}{run}/{{view}}", self.run_view),
            Route(f"{API}{run}/{{view}}/{{table}}.csv", self.run_view),
        ]

    async def runs(self, request: Request) -> Response:
        """All runs."""
        folders = await run_in_threadpool(self.library.folders)
        alone = next((name for name, at in folders.items() if at == self.library.root), None)
        if alone is not None and request.url.path == "/":
            return RedirectResponse(run_address(alone), 303)
        question = _question(request)
        shown = version(await run_in_threadpool(self._stamp))
        page = await run_in_threadpool(library_views.runs, self.library, question)
        return self._answer(request, page, "runs.html.jinja", "runs", stream="/stream", shown=shown)

    async def compare(self, request: Request) -> Response:
        """Runs over each other."""
        question = _question(request)
        page = await run_in_threadpool(library_views.compare, self.library, question)
        return self._answer(request, page, "compare.html.jinja")

    async def server(self, request: Request) -> Response:
        """The machine."""
        page = await run_in_threadpool(
            library_views.server,
            self.library,
            self.channels.viewers,
            self.desk.jobs.json(),
            self.meters,
        )
        return self._answer(request, page, "server.html.jinja")

    async def access(self, request: Request) -> Response:
        """Accounts and tokens, for operators."""
        page = await run_in_threadpool(access, self.accounts, _question(request))
        return self._answer(request, page, "access.html.jinja")

    async def revoke_token(self, request: Request) -> Response:
        """End a program's token."""
        if request.method == "GET":
            return RedirectResponse("/access", 303)
        form: dict[str, str] = {}
        try:
            form = await form_of(request)
            reason = form.get("reason", "").strip()[:500]
            if not reason:
                raise ControlError("say why: the reason stands in the record")
            who = request.scope["session"].name
            self.accounts.revoke_token(form.get("token", ""), who=who, reason=reason)
        except StaleForm as error:
            problem, form, status = str(error), error.fields, 403
        except (AccountError, ControlError, ValueError) as error:
            problem, status = str(error), 409
        else:
            return RedirectResponse("/access", 303)
        page = await run_in_threadpool(access, self.accounts, Question())
        html = self._page(
            request, page, "access.html.jinja", path="/access", problem=problem, form=form
        )
        return HTMLResponse(html, status)

    async def devices(self, request: Request) -> Response:
        """Who has joined the deployment, and who may."""
        page = await run_in_threadpool(devices.devices, self.library.root, _question(request))
        return self._answer(request, page, "devices.html.jinja")

    async def invite(self, request: Request) -> Response:
        """An enrolment token for a device: the one answer that ever holds it."""
        if request.method == "GET":
            return RedirectResponse("/devices", 303)
        made, problem, status = None, "", 201
        form: dict[str, str] = {}
        root = self.library.root
        try:
            form = await form_of(request)
            who = request.scope["session"]
            made = await run_in_threadpool(devices.invite, root, form, who)
        except StaleForm as error:
            problem, form, status = str(error), error.fields, 403
        except (ControlError, LedgerError, ValueError) as error:
            problem, status = str(error), 409
        if _wants_json(request):
            told = {"error": problem} if made is None else {**vars(made), "command": made.command}
            return JSONResponse(told, status)
        page = await run_in_threadpool(devices.devices, root, Question())
        typed = form if problem else {}
        html = self._page(
            request,
            page,
            "devices.html.jinja",
            path="/devices",
            problem=problem,
            made=made,
            form=typed,
        )
        return HTMLResponse(html, status)

    async def start_replay(self, request: Request) -> Response:
        """Replay a run to a round."""
        run = await run_in_threadpool(self._reader, request)
        here = run_address(run.identity, "ledger")
        if request.method == "GET":
            return RedirectResponse(here, 303)
        form: dict[str, str] = {}
        try:
            form = await form_of(request)
            number = int(form.get("round", ""))
            await run_in_threadpool(self.replays.start, run, number)
        except StaleForm as error:
            problem, form, status = str(error), error.fields, 403
        except JobError as error:
            problem, status = str(error), 409
        except ValueError:
            problem, status = "give the number of a round", 409
        else:
            return RedirectResponse(run_address(run.identity, "rounds", number, "replay"), 303)
        view = BY_NAME["ledger"]
        page = await run_in_threadpool(view.make, run, Question())
        html = self._page(
            request, page, view.template, view=view, path=here, problem=problem, form=form
        )
        return HTMLResponse(html, status)

    async def replay(self, request: Request) -> Response:
        """How far the replay of a round is, and what it gave."""
        run = await run_in_threadpool(self._reader, request)
        page = await run_in_threadpool(self.replays.page, run, request.path_params["round"])
        return self._answer(request, page, "replay.html.jinja", view=ROUND)

    async def report(self, request: Request) -> Response:
        """The run's report as a file: a page of its own, which this server's policy is not for."""
        run = await run_in_threadpool(self._reader, request)
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
        run = await run_in_threadpool(self._reader, request)
        # Before the page is made: what changes meanwhile is a change to it.
        shown = version(await run_in_threadpool(run_stamp(run)))
        page = await run_in_threadpool(view.make, run, _question(request))
        kind = "?live=1" if view.name == "" else ""
        stream = f"{run_address(run.identity)}/stream{kind}"
        return self._answer(request, page, view.template, view=view, stream=stream, shown=shown)

    async def verify(self, request: Request) -> Response:
        """Hash everything again."""
        run = await run_in_threadpool(self._reader, request)
        try:
            found = await self.verifications.verify(run.folder)
        except VerificationError as error:
            return PlainTextResponse(str(error), 503)
        page = Page({"run": run.identity, **found})
        return self._answer(request, page, "verify.html.jinja")

    async def act(self, request: Request) -> Response:
        """An operator's action on a run; refused, the page again with what was typed and why."""
        run = await run_in_threadpool(self._reader, request)
        action = request.path_params["action"]
        here = run_address(run.identity, "control")
        if request.method == "GET":
            return RedirectResponse(here, 303)
        done, problem, status = "", "", 202
        form: dict[str, str] = {}
        try:
            form = await form_of(request)
            done = await run_in_threadpool(
                self.desk.act, run, action, form, request.scope["session"]
            )
        except StaleForm as error:
            problem, form, status = str(error), error.fields, 403
        except (ControlError, JobError, LedgerError, ValueError) as error:
            problem, status = str(error), 409
        if _wants_json(request):
            return JSONResponse({"error": problem} if problem else {"done": done}, status)
        if not problem:
            return RedirectResponse(here, 303)
        confirming = {"revoke": form.get("node", "")} if action == "revoke" else {}
        page = await run_in_threadpool(actions.control, run, Question(values=confirming))
        view = BY_NAME["control"]
        html = self._page(
            request,
            page,
            view.template,
            view=view,
            path=here,
            problem=problem,
            form=form | {"action": action},
        )
        return HTMLResponse(html, status)

    async def start(self, request: Request) -> Response:
        """The form that starts a simulation, and what it sends."""
        form: dict[str, str] = {}
        problem, status = "", 200
        if request.method == "POST":
            try:
                form = await form_of(request)
                session = request.scope["session"]
                name = await run_in_threadpool(self.desk.start, form, session)
                return RedirectResponse("/server?" + urlencode({"started": name}), 303)
            except StaleForm as error:
                problem, form, status = str(error), error.fields, 403
            except (ControlError, JobError, ValueError) as error:
                problem, status = str(error), 409
        html = render(
            "start.html.jinja",
            session=request.scope["session"],
            path="/start",
            root=str(self.library.root),
            scenarios=scenario_names(),
            problem=problem,
            form=form,
        )
        return HTMLResponse(html, status)

    async def run_stream(self, request: Request) -> Response:
        """Events of a run's pages: what the live view shows, or only that something has changed."""
        run = await run_in_threadpool(self._reader, request)
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
            return self.accounts.session(cookie) is not None

        return StreamingResponse(
            messages(alive),
            media_type="text/event-stream",
            headers={"x-accel-buffering": "no"},
        )

    def _stamp(self) -> Any:
        return [(row["run"], row["state"], row["changed"]) for row in self.library.rows()]

    def _reader(self, request: Request) -> RunReader:
        run = self.library.reader(request.path_params["run"])
        if run is None:
            raise NotThere("there is no such run")
        return run

    def _answer(
        self,
        request: Request,
        page: Page,
        template: str,
        table: str = "",
        *,
        view: View | None = None,
        stream: str = "",
        shown: str = "",
    ) -> Response:
        path = request.url.path
        if path.endswith(".csv"):
            found = page.tables.get(request.path_params.get("table", table))
            if found is None:
                raise NotThere("there is no such table")
            disposition = f'attachment; filename="{found.name}.csv"'
            return Response(
                to_csv(found),
                media_type="text/csv; charset=utf-8",
                headers={"content-disposition": disposition},
            )
        if path.startswith(API):
            return JSONResponse(page.json())
        html = self._page(request, page, template, view=view, stream=stream, shown=shown)
        return HTMLResponse(html)

    def _page(
        self,
        request: Request,
        page: Page,
        template: str,
        *,
        view: View | None = None,
        stream: str = "",
        shown: str = "",
        problem: str = "",
        path: str = "",
        made: Invitation | None = None,
        form: Mapping[str, str] | None = None,
    ) -> str:
        path = path or request.url.path
        run = page.data.get("run")
        return render(
            template,
            page,
            session=request.scope["session"],
            problem=problem,
            made=made,
            form=form or {},
            jobs=self.desk.jobs.json(run) if run else [],
            path=path,
            stream=stream,
            shown=shown,
            view=view,
            views=VIEWS,
            runs_query=urlencode([("run", run) for run in request.query_params.getlist("run")]),
            api=API
            + ("/runs" if path == "/" else path if view is None or view.name else path + "/live"),
        )


def _wants_json(request: Request) -> bool:
    return "application/json" in request.headers.get("accept", "")


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


def _question(request: Request) -> Question:
    query = request.query_params
    page = query.get("page", "1")
    choice = Choice(
        page=int(page) if page.isdecimal() and len(page) < 9 else 1,
        words=query.get("q", "")[:200],
        sort=query.get("sort", "")[:60],
        whole=request.url.path.endswith(".csv"),
    )
    return Question(
        choice,
        dict(query),
        tuple(dict.fromkeys(query.getlist("run"))),
        request.path_params.get("round", 0),
    )


def _not_found(request: Request, error: Exception) -> Response:
    words = str(error) if isinstance(error, NotThere) else "there is nothing at this address"
    if request.url.path.startswith(API):
        return JSONResponse({"error": words}, 404)
    session = request.scope.get("session")
    html = render("missing.html.jinja", session=session, title="Not found", words=words)
    return HTMLResponse(html, 404)
