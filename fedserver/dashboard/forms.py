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
from fedserver.dashboard.accounts import Accounts
from fedserver.dashboard.actions import Desk, scenario_names
from fedserver.dashboard.answers import wants_json
from fedserver.dashboard.html import render
from fedserver.dashboard.page import Question, run_address
from fedserver.dashboard.registry import BY_NAME
from fedserver.dashboard.replays import Replays
from fedserver.dashboard.sent_forms import FormAnswers


class Forms(FormAnswers):
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

        def carry_out(form: dict[str, str]) -> str:
            return self.desk.act(run, action, form, request.scope["session"])

        sent = await self.sent(request, carry_out)
        if sent is None:
            return RedirectResponse(here, 303)
        if wants_json(request):
            told = {"error": sent.problem} if sent.problem else {"done": sent.made}
            return JSONResponse(told, sent.status if sent.problem else 202)
        if not sent.problem:
            return RedirectResponse(here, 303)
        confirming = {"revoke": sent.form.get("node", "")} if action == "revoke" else {}
        page = await run_in_threadpool(actions.control, run, Question(values=confirming))
        shown = sent.form | {"action": action}
        return self.again(request, sent, page, here, view=BY_NAME["control"], form=shown)

    async def start(self, request: Request) -> Response:
        """The form that starts a simulation, and what it sends."""
        sent = await self.sent(
            request, lambda form: self.desk.start(form, request.scope["session"])
        )
        if sent is not None and not sent.problem:
            return RedirectResponse("/server?" + urlencode({"started": sent.made}), 303)
        html = render(
            "start.html.jinja",
            session=request.scope["session"],
            path="/start",
            root=str(self.desk.place),
            nowhere=await run_in_threadpool(self.desk.no_start),
            scenarios=scenario_names(),
            problem=sent.problem if sent else "",
            form=sent.form if sent else {},
        )
        return HTMLResponse(html, sent.status if sent else 200)

    async def invite(self, request: Request) -> Response:
        """An enrolment token for a device: this answer or the page after it holds it, and no other."""
        root, here = self.library.root, "/devices"
        sent = await self.sent(
            request, lambda form: devices.invite(root, form, request.scope["session"])
        )
        if sent is None:
            return RedirectResponse(here, 303)
        if wants_json(request) or request.scope["bearer"]:
            made = sent.made
            told = (
                {"error": sent.problem} if made is None else vars(made) | {"command": made.command}
            )
            return JSONResponse(told, sent.status if sent.problem else 201)
        if sent.problem:
            page = await run_in_threadpool(devices.devices, root, Question())
            return self.again(request, sent, page, here, "devices.html.jinja")
        # A page that is loaded again must not send the form again.
        request.scope["session"].made = sent.made
        return RedirectResponse(here, 303)

    async def revoke_token(self, request: Request) -> Response:
        """End a program's token."""

        def revoke(form: dict[str, str]) -> object:
            reason = form.get("reason", "").strip()[:500]
            if not reason:
                raise ControlError("say why: the reason stands in the record")
            who = request.scope["session"].name
            return self.accounts.revoke_token(form.get("token", ""), who=who, reason=reason)

        sent = await self.sent(request, revoke)
        if sent is None or not sent.problem:
            return RedirectResponse("/access", 303)
        page = await run_in_threadpool(access, self.accounts, Question())
        return self.again(request, sent, page, "/access", "access.html.jinja")

    async def start_replay(self, request: Request) -> Response:
        """Replay a run to a round."""
        run = await run_in_threadpool(self.reader, request)
        here = run_address(run.identity, "ledger")

        def start(form: dict[str, str]) -> int:
            word = form.get("round", "")
            if not word.isdecimal():
                raise ControlError("give the number of a round")
            self.replays.start(run, int(word))
            return int(word)

        sent = await self.sent(request, start)
        if sent is None:
            return RedirectResponse(here, 303)
        if not sent.problem:
            return RedirectResponse(run_address(run.identity, "rounds", sent.made, "replay"), 303)
        page = await run_in_threadpool(BY_NAME["ledger"].make, run, Question())
        return self.again(request, sent, page, here, view=BY_NAME["ledger"])
