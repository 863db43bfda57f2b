"""How a view is written: as a page, as JSON, as one of its tables in CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from fedserver.dashboard.html import render
from fedserver.dashboard.jobs import Jobs, jobs_table
from fedserver.dashboard.library import Library
from fedserver.dashboard.page import NotThere, Page, Question
from fedserver.dashboard.registry import VIEWS, View
from fedserver.dashboard.run_reader import RunReader
from fedserver.dashboard.sound_values import plain
from fedserver.dashboard.tables import Choice, to_csv

if TYPE_CHECKING:
    from fedserver.deployment.invitation import Invitation

API = "/api/v1"
WHOLE = Choice(whole=True)
MOST_ROUNDS = 2**63 - 1
"""Of a round's number in an address, which a database's integer holds."""


class PlainJSON(JSONResponse):
    """JSON of what a run's files say: what is no number is null, and what is no character is "?"."""

    def render(self, content: Any) -> bytes:
        """As bytes."""
        return json.dumps(
            plain(content), ensure_ascii=False, allow_nan=False, separators=(",", ":")
        ).encode("utf-8", "replace")


class Answers:
    """Answers to requests, over one library of runs."""

    def __init__(self, library: Library, jobs: Jobs) -> None:
        self.library = library
        self.jobs = jobs

    def reader(self, request: Request) -> RunReader:
        """Of the run that an address names. Raises NotThere."""
        run = self.library.reader(request.path_params["run"])
        if run is None:
            raise NotThere("there is no such run")
        return run

    def answer(
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
        """A view as its address asks for it; ``table`` is the one of a CSV whose address names none."""
        path = request.url.path
        if path.endswith(".csv"):
            found = page.tables.get(request.path_params.get("table", table))
            if found is None:
                raise NotThere("there is no such table")
            disposition = f'attachment; filename="{found.name}.csv"'
            return Response(
                to_csv(found).encode("utf-8", "replace"),
                media_type="text/csv; charset=utf-8",
                headers={"content-disposition": disposition},
            )
        if path.startswith(API):
            return PlainJSON(page.json())
        html = self.page(request, page, template, view=view, stream=stream, shown=shown)
        return HTMLResponse(html)

    def page(
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
        """A view as HTML. ``problem``: why a ``form`` was refused, which is shown as filled in."""
        path = path or request.url.path
        run = page.data.get("run")
        return render(
            template,
            page,
            session=request.scope["session"],
            problem=problem,
            made=made,
            form=form or {},
            jobs=jobs_table(self.jobs.json(run), WHOLE) if run else None,
            path=path,
            stream=stream,
            shown=shown,
            view=view,
            views=VIEWS,
            runs_query=urlencode([("run", run) for run in request.query_params.getlist("run")]),
            api=API
            + ("/runs" if path == "/" else path if view is None or view.name else path + "/live"),
        )


def wants_json(request: Request) -> bool:
    """Whether a program has sent a form."""
    return "application/json" in request.headers.get("accept", "")


def question_of(request: Request) -> Question:
    """What a request's address asks of a view."""
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
        min(request.path_params.get("round", 0), MOST_ROUNDS),
    )
