"""What people send: a form is carried out, or shown again with what was typed and why it was refused."""

from __future__ import annotations

from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from fedserver.control import ControlError
from fedserver.dashboard import actions, devices
from fedserver.dashboard.access_view import access
from fedserver.dashboard.accounts import AccountError, Accounts
from fedserver.dashboard.actions import Desk, scenario_names
from fedserver.dashboard.answers import Answers, wants_json
from fedserver.dashboard.guard import StaleForm, operators_form
from fedserver.dashboard.html import render
from fedserver.dashboard.jobs import JobError
from fedserver.dashboard.page import Question, run_address
from fedserver.dashboard.registry import BY_NAME
from fedserver.dashboard.replays import Replays
from fedserver.ledger import LedgerError


class Forms(Answers):
    """The handlers of forms. Where one is sent can be opened as well: it leads to the form's page."""

    def __init__(self, desk: Desk, accounts: Accounts, replays: Replays) -> None:
        super().__init__(desk.library, desk.jobs)
        self.desk, self.accounts, self.replays = desk, accounts, replays

    def routes(self) -> list[Route]:
        """Every address that a form is sent to."""
        run, methods = "/runs/{run}", ["GET", "POST"]
        return [
            Route("/start", self.start, methods=methods),
            Route("/devices/invite", self.invite, methods=methods),
            Route("/access/revoke", self.revoke_token, methods=methods),
            Route(f"{run}/actions/{{action}}", self.act, methods=methods),
            Route(f"{run}/ledger/replay", self.start_replay, methods=methods),
        ]

    async def act(self, request: Request) -> Response:
        """An operator's action on a run; refused, the page again with what was typed and why."""
        run = await run_in_threadpool(self.reader, request)
        action = request.path_params["action"]
        here = run_address(run.identity, "control")
        if request.method != "POST":
            return RedirectResponse(here, 303)
        done, problem, status = "", "", 202
        form: dict[str, str] = {}
        try:
            form = await operators_form(request)
            done = await run_in_threadpool(
                self.desk.act, run, action, form, request.scope["session"]
            )
        except StaleForm as error:
            problem, form, status = str(error), error.fields, 403
        except (ControlError, JobError, LedgerError, ValueError) as error:
            problem, status = str(error), 409
        if wants_json(request):
            return JSONResponse({"error": problem} if problem else {"done": done}, status)
        if not problem:
            return RedirectResponse(here, 303)
        confirming = {"revoke": form.get("node", "")} if action == "revoke" else {}
        page = await run_in_threadpool(actions.control, run, Question(values=confirming))
        view = BY_NAME["control"]
        html = self.page(
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
                form = await operators_form(request)
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

    async def invite(self, request: Request) -> Response:
        """An enrolment token for a device: the one answer that ever holds it."""
        if request.method != "POST":
            return RedirectResponse("/devices", 303)
        made, problem, status = None, "", 201
        form: dict[str, str] = {}
        root = self.library.root
        try:
            form = await operators_form(request)
            who = request.scope["session"]
            made = await run_in_threadpool(devices.invite, root, form, who)
        except StaleForm as error:
            problem, form, status = str(error), error.fields, 403
        except (ControlError, LedgerError, ValueError) as error:
            problem, status = str(error), 409
        if wants_json(request):
            told = {"error": problem} if made is None else {**vars(made), "command": made.command}
            return JSONResponse(told, status)
        page = await run_in_threadpool(devices.devices, root, Question())
        typed = form if problem else {}
        html = self.page(
            request,
            page,
            "devices.html.jinja",
            path="/devices",
            problem=problem,
            made=made,
            form=typed,
        )
        return HTMLResponse(html, status)

    async def revoke_token(self, request: Request) -> Response:
        """End a program's token."""
        if request.method != "POST":
            return RedirectResponse("/access", 303)
        form: dict[str, str] = {}
        try:
            form = await operators_form(request)
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
        html = self.page(
            request, page, "access.html.jinja", path="/access", problem=problem, form=form
        )
        return HTMLResponse(html, status)

    async def start_replay(self, request: Request) -> Response:
        """Replay a run to a round."""
        run = await run_in_threadpool(self.reader, request)
        here = run_address(run.identity, "ledger")
        if request.method != "POST":
            return RedirectResponse(here, 303)
        form: dict[str, str] = {}
        try:
            form = await operators_form(request)
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
        html = self.page(
            request, page, view.template, view=view, path=here, problem=problem, form=form
        )
        return HTMLResponse(html, status)
