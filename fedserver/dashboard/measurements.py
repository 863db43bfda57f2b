"""Distances between a round's updates, measured when an operator asks, in a process with torch.

They are no part of a ledger and change nothing; what was measured is known by run and by the hash of the
round's entry as long as the job's output is kept. A measurement costs a processor for a while, so only
operators start one, and one at a time for a run.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from fedserver.control import ControlError
from fedserver.dashboard.answers import API, MOST_ROUNDS, question_of, wants_json
from fedserver.dashboard.jobs import Job, JobError, Jobs, printed
from fedserver.dashboard.library import Library
from fedserver.dashboard.page import NotThere, Page, Question, page_of, run_address
from fedserver.dashboard.registry import BY_NAME, ROUND
from fedserver.dashboard.round_views import header, words
from fedserver.dashboard.run_files import Row
from fedserver.dashboard.run_reader import RunReader
from fedserver.dashboard.sent_forms import FormAnswers
from fedserver.dashboard.tables import Column, make_table

ROBUSTNESS = "robustness"
MEASURED = "measured"
"""The id of the part of the page that says how far a measurement is."""
REMEMBERED = 200
DISTANCES = (
    Column("node", "Node"),
    Column("family", "Family"),
    Column("share", "Share of its family's mean", "bar"),
    Column("norm", "Norm", "number"),
    Column("distance", "Distance", "number"),
    Column("over_median", "Distance against its family's median", "number"),
    Column("cosine", "Cosine to the others", "number"),
    Column("of", "Of"),
)


@dataclass(frozen=True)
class _Measurement:
    entry: str
    job: Job


class Measurements:
    """The newest measurement of each round that somebody asked for since the dashboard was started."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._found: dict[tuple[str, int], _Measurement] = {}
        self._asked: dict[str, int] = {}
        self._lock = threading.Lock()

    def start(self, run: RunReader, number: int) -> None:
        """Measure a round, unless that is being done, or was done and the entry is still the same.

        Raises:
            NotThere: the round was not committed.
            JobError: another round of the run is being measured, or too much is at work.
        """
        entry = _entry_of(run, number)
        with self._lock:
            for (identity, other), one in self._found.items():
                if identity == run.identity and other != number and one.job.process.poll() is None:
                    raise JobError(f"round {other} is being measured; wait for its end")
            held = self._found.pop((run.identity, number), None)
            lost = held is not None and not held.job.log.is_file()
            if held is None or lost or held.entry != entry or _state(held.job) == "failed":
                command = ["ledger", "distances", str(run.folder), "--round", str(number), "--json"]
                title = f"distances of round {number}"
                held = _Measurement(
                    entry, self._jobs.start(title, run.identity, command, run.folder)
                )
            self._found[run.identity, number] = held
            self._asked[run.identity] = number
            while len(self._found) > REMEMBERED:
                del self._found[next(iter(self._found))]

    def told(self, run: RunReader, number: int | None = None) -> dict[str, Any]:
        """Of a round, or of the one that was asked for last: what is known of its measurement.

        ``state``: not asked, working, finished or failed. ``rows``: its updates, when finished.
        """
        with self._lock:
            number = self._asked.get(run.identity) if number is None else number
            held = None if number is None else self._found.get((run.identity, number))
        found: dict[str, Any] = {
            "round": number,
            "entry": None,
            "state": "not asked",
            "what": "",
            "done": 0,
            "of": 0,
            "said": "",
            "rows": (),
        }
        if number is None or held is None or not held.job.log.is_file():
            return found
        # The folder may hold another run of that name by now.
        if _hash_of(run, number) != held.entry:
            return found
        found |= {"entry": held.entry, "state": _state(held.job)}
        if found["state"] == "finished":
            return found | {"rows": _rows(held.job.log)}
        if found["state"] == "failed":
            return found | {"said": held.job.json()["said"].removeprefix("error: ")}
        progress = [line for line in printed(held.job.log) if line.get("event") == "progress"]
        return found | {key: progress[-1][key] for key in ("what", "done", "of") if progress}

    def page(self, run: RunReader, question: Question) -> Page:
        """The distances of one round, as far as they were measured."""
        entry = _entry_of(run, question.round)
        told = self.told(run, question.round)
        rows = [
            row
            | {
                "family": words(row["family"]),
                "of": "the sum of its devices" if row["edge"] else "its own update",
            }
            for row in told["rows"]
        ]
        data = {
            **header(run),
            "shown": question.round,
            "hash": entry,
            "measurement": {key: value for key, value in told.items() if key != "rows"},
        }
        table = make_table(
            "distances",
            f"Distances in round {question.round}",
            DISTANCES if any(row["edge"] for row in rows) else DISTANCES[:-1],
            rows,
            question.choice,
            empty="Nothing was measured.",
        )
        return page_of(data, table)


class MeasurementPages(FormAnswers):
    """Where a measurement is asked for, and a round's own page of it."""

    def __init__(self, library: Library, jobs: Jobs, measurements: Measurements) -> None:
        super().__init__(library, jobs)
        self.measurements = measurements

    def routes(self) -> list[Route]:
        """Their addresses."""
        of_round = "/runs/{run}/rounds/{round:int}/distances"
        return [
            Route(f"/runs/{{run}}/{ROBUSTNESS}/measure", self.measure, methods=["GET", "POST"]),
            Route(of_round, self.of_round),
            Route(f"{API}{of_round}", self.of_round),
            Route(f"{API}{of_round}/{{table}}.csv", self.of_round),
        ]

    async def of_round(self, request: Request) -> Response:
        """The distances of a round, as far as they were measured."""
        run = await run_in_threadpool(self.reader, request)
        page = await run_in_threadpool(self.measurements.page, run, question_of(request))
        return self.answer(request, page, "distances.html.jinja", view=ROUND)

    async def measure(self, request: Request) -> Response:
        """Start a measurement; refused, the page again with the reason."""
        run = await run_in_threadpool(self.reader, request)
        here = run_address(run.identity, ROBUSTNESS)

        def start(form: dict[str, str]) -> int:
            word = form.get("round", "")
            if not word.isdecimal():
                raise ControlError("give the number of a round")
            number = min(int(word), MOST_ROUNDS)
            self.measurements.start(run, number)
            return number

        sent = await self.sent(request, start)
        if sent is None:
            return RedirectResponse(here, 303)
        if wants_json(request):
            told = {"error": sent.problem}
            if not sent.problem:
                of_round = run_address(run.identity, "rounds", sent.made, "distances")
                told = {"measured at": f"{API}{of_round}"}
            return JSONResponse(told, sent.status if sent.problem else 202)
        if not sent.problem:
            return RedirectResponse(here, 303)
        view = BY_NAME[ROBUSTNESS]
        measured = await run_in_threadpool(self.measurements.told, run)
        page = await run_in_threadpool(view.make, run, Question(measured=measured))
        return self.again(request, sent, page, here, view=view)


def _entry_of(run: RunReader, number: int) -> str:
    found = _hash_of(run, number)
    if found is None:
        raise NotThere(f"round {number} was not committed")
    return found


def _hash_of(run: RunReader, number: int) -> str | None:
    """Of a round's entry, without reading what it holds: there may be thousands of nodes."""
    entries = (one for one in run.entries() if (one["kind"], one["round"]) == ("round", number))
    return next((str(one["hash"]) for one in entries), None)


def _state(job: Job) -> str:
    code = job.process.poll()
    return "working" if code is None else "failed" if code else "finished"


@functools.lru_cache(maxsize=4)
def _rows(log: Path) -> tuple[Row, ...]:
    """What a measurement that has ended printed."""
    return tuple(line for line in printed(log) if "over_median" in line)
