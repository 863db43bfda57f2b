"""A form that somebody sent: carried out, or shown again with what was typed and why it was refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from fedserver.control import ControlError
from fedserver.dashboard.accounts import AccountError
from fedserver.dashboard.answers import Answers
from fedserver.dashboard.guard import StaleForm, operators_form
from fedserver.dashboard.jobs import JobError
from fedserver.dashboard.page import Page
from fedserver.dashboard.registry import View
from fedserver.ledger import LedgerError

REFUSALS = (AccountError, ControlError, JobError, LedgerError, ValueError)


@dataclass(frozen=True)
class Sent:
    """A form that somebody sent: what it made, or the ``problem`` for which it was refused."""

    form: dict[str, str]
    problem: str = ""
    status: int = 200
    made: Any = None


class FormAnswers(Answers):
    """Handlers of forms."""

    async def sent(
        self, request: Request, carry_out: Callable[[dict[str, str]], Any]
    ) -> Sent | None:
        """A form carried out, in a thread of its own, or why it was refused; None: none was sent."""
        if request.method != "POST":
            return None
        form: dict[str, str] = {}
        try:
            form = await operators_form(request)
            return Sent(form, made=await run_in_threadpool(carry_out, form))
        except StaleForm as error:
            return Sent(error.fields, str(error), 403)
        except REFUSALS as error:
            return Sent(form, str(error), 409)

    def again(
        self,
        request: Request,
        sent: Sent,
        page: Page,
        here: str,
        template: str = "",
        *,
        view: View | None = None,
        form: dict[str, str] | None = None,
    ) -> Response:
        """The page of a refused form, with what was typed and why."""
        html = self.page(
            request,
            page,
            view.template if view is not None else template,
            view=view,
            path=here,
            problem=sent.problem,
            form=sent.form if form is None else form,
        )
        return HTMLResponse(html, sent.status)
