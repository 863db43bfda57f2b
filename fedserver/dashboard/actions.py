"""What operators do, from a form to the run's queue, its ledger, or a job.

A run that is under way reads its queue between rounds. What only has to be recorded in a run that has
ended is appended here: nobody else holds its ledger then.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fedserver
from fedserver.control import (
    CONTROL,
    EXCLUDING,
    EXPORTS,
    REFUSED,
    REVOKED,
    ControlError,
    ControlQueue,
    Request,
)
from fedserver.dashboard import errands
from fedserver.dashboard.accounts import Session
from fedserver.dashboard.home import deployment_of
from fedserver.dashboard.jobs import JobError, Jobs, refusal_of
from fedserver.dashboard.ledger_views import words_of
from fedserver.dashboard.library import Library
from fedserver.dashboard.page import Page, Question, page_of
from fedserver.dashboard.round_views import header
from fedserver.dashboard.run_reader import RunReader
from fedserver.dashboard.standings import standings
from fedserver.dashboard.tables import Column, make_table
from fedserver.ledger import KEYS

MOST_NAMES = 1000
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
OVERRIDE = re.compile(r"[A-Za-z0-9_.]+=[^\x00-\x1f]{0,300}")
REQUESTS = (
    Column("asked", "Asked", "time"),
    Column("action", "Action"),
    Column("with", "With"),
    Column("who", "Who"),
    Column("reason", "Reason"),
    Column("state", "State", "state"),
    Column("note", "Note"),
)
OFFERED = {
    "running": {"pause", "stop", "next_round", "rollback", "export", *EXCLUDING, "readmit"},
    "paused": {"resume", "stop", "next_round", "rollback", "export", *EXCLUDING, "readmit"},
    "held": {"pause", "stop", "next_round", "rollback", "export", *EXCLUDING, "readmit"},
    "interrupted": {"continue", "rollback", "next_round", "export", *EXCLUDING, "readmit"},
    "stopped": {"continue", "rollback", "next_round", "export", *EXCLUDING, "readmit"},
    "failed": {"continue", "rollback", "next_round", "export", *EXCLUDING, "readmit"},
    "finished": {"export"},
    "no_quorum": {"export"},
    "unknown": {"export"},
}
"""Which actions make sense in which state of a run."""
ERRANDS = ("export", "continue")
"""Those that a process of their own carries out."""
NOT_HERE = {
    "adopt_budget": "a privacy budget cannot be adopted: this version adds no noise to updates, so"
    " nothing would hold a run to it",
    "start": "a run is started from the list of runs",
}
"""Why an action that somebody may look for is none of a run's."""


@dataclass(frozen=True)
class Desk:
    """Where an operator's forms arrive."""

    library: Library
    jobs: Jobs
    _names: threading.Lock = field(default_factory=threading.Lock)
    _asking: threading.Lock = field(default_factory=threading.Lock)

    def act(self, run: RunReader, action: str, form: Mapping[str, str], who: Session) -> str:
        """Carry out or queue an action; returns what was done, in words.

        Raises:
            ControlError: the action makes no sense for this run now, or lacks something.
            JobError: too much is at work.
        """
        if action not in set().union(*OFFERED.values()):
            raise ControlError(NOT_HERE.get(action, f"there is no action {action!r}"))
        state = str(header(run)["state"])
        if action not in OFFERED.get(state, set()):
            raise ControlError(f"{action.replace('_', ' ')} is not possible: the run is {state}")
        if action == "revoke" and form.get("confirm", form.get("node")) != form.get("node"):
            raise ControlError("nothing was revoked: the name that was typed is not the node's")
        if action == "continue" and (why := no_continuation(run)):
            raise ControlError(why)
        arguments = arguments_of(action, form)
        number = header(run)["round"]
        if action == "export":
            kind = form.get("kind", "peft")
            if why := exports(run).get(kind, ""):
                raise ControlError(why)
            arguments = {"kind": kind, "round": number, "to": f"exports/{kind}-round-{number}"}
        with self._asking:
            self._once(run, action, arguments)
            asked = ControlQueue(run.folder).ask(
                action, arguments, who=who.name, role=who.role, reason=form.get("reason", "")
            )
            if action == "export":
                target = str(run.folder / arguments["to"])
                # The run may have committed another one before the process looks.
                command = ["export", kind, str(run.folder), "--round", str(number), "--to", target]
                self._errand(f"export {kind} after round {number}", run, asked, command, number)
                return f"exporting to {target}"
            if action == "continue":
                command = ["simulate", "scenario.toml", "--output", ".", "--resume", "--json"]
                self._errand("continue the run", run, asked, command, 0)
                return "continuing"
        return "asked: it is applied before the next round begins"

    def _once(self, run: RunReader, action: str, arguments: Mapping[str, Any]) -> None:
        """Refuse what somebody has asked already and is yet to be done."""
        for other in ControlQueue(run.folder).requests():
            same = (other.action, other.arguments) == (action, arguments)
            # A process that makes an export or continues a run may have been ended before it said so.
            lost = action in ERRANDS and not self.jobs.working(run.identity)
            if same and other.settled is None and not lost:
                raise ControlError(f"{other.who} has asked for it already: {other.reason}")

    def _errand(
        self, title: str, run: RunReader, asked: Request, command: list[str], number: int
    ) -> None:
        key_file = self._sealing_key(run.folder)
        told = errands.question(run.folder, asked, command, number, key_file)
        try:
            self.jobs.start(title, run.identity, [told], run.folder, program=errands.PROGRAM)
        except JobError as error:
            ControlQueue(run.folder).settle(asked, REFUSED, str(error))
            raise

    def _sealing_key(self, folder: Path) -> Path | None:
        """The key of the deployment's runs; None for a run that has one of its own."""
        if (folder / KEYS).is_dir():
            return None
        deployment = deployment_of(self.library.root)
        return None if deployment is None else deployment.sealing_key

    @property
    def place(self) -> Path:
        """Where new runs are made: of a deployment that is served itself among its runs."""
        deployment = deployment_of(self.library.root)
        return self.library.root if deployment is None else deployment.runs

    def no_start(self) -> str:
        """Why no run can be started here; "" where one can."""
        if self.library.alone() is None:
            return ""
        root = self.library.root
        return (
            f"{root} is one run, and no place for others: fedbraid dashboard {root.parent} serves all"
            " runs beside it, and starts new ones there"
        )

    def start(self, form: Mapping[str, str], who: Session) -> str:
        """Start a simulation of a scenario among the served runs; returns the run's name.

        Raises:
            ControlError: no folder of runs, a name that is taken or no name, changes that the scenario
                does not take, or a base model that is not here.
            JobError: too much is at work.
        """
        if why := self.no_start():
            raise ControlError(why)
        scenario, name = form.get("scenario", "").strip(), form.get("name", "").strip()
        if not RUN_NAME.fullmatch(name):
            raise ControlError("a run's name is letters, digits and . _ -")
        if not RUN_NAME.fullmatch(scenario):
            raise ControlError("give the name of a scenario that comes with fedbraid")
        overrides = [
            line.strip() for line in form.get("overrides", "").splitlines() if line.strip()
        ]
        if wrong := [line for line in overrides if not OVERRIDE.fullmatch(line)]:
            raise ControlError(f"{wrong[0]!r} is no KEY=VALUE")
        folder = self.place / name
        run = name if self.place == self.library.root else f"{self.place.name}:{name}"
        self._free(folder, run)
        taken = ControlError(f"there is a run {name} already; choose another name")
        if folder.exists():
            raise taken
        reason = form.get("reason", "")
        if not reason.strip():
            raise ControlError("say why: the reason stands in the ledger")
        settings = [word for line in [*overrides, f"name={name}"] for word in ("--set", line)]
        if why := refusal_of(["validate", "--here", scenario, *settings], self.library.root):
            raise ControlError(why)
        arguments = {"scenario": scenario, "overrides": overrides}
        command = ["simulate", scenario, *settings, "--output", str(folder), "--json"]
        free = partial(self._free, folder, run)
        with self._names:
            if folder.exists():
                raise taken
            folder.mkdir()
            ControlQueue(folder).ask("start", arguments, who=who.name, role=who.role, reason=reason)
            try:
                self.jobs.start(f"simulate {scenario}", run, command, self.library.root, ended=free)
            except JobError:
                shutil.rmtree(folder)
                raise
        return name

    def _free(self, folder: Path, run: str) -> None:
        """Give the name of a run back that was asked for here and never began."""
        with self._names:
            if self.jobs.working(run) or not folder.is_dir():
                return
            if all(path.name.startswith(CONTROL) for path in folder.iterdir()):
                shutil.rmtree(folder)


def control(run: RunReader, question: Question) -> Page:
    """What operators asked of this run and what came of it, and what they may ask now."""
    top = header(run)
    rows = [
        {
            "asked": request.asked,
            "action": request.action.replace("_", " "),
            "with": words_of(request.arguments),
            "who": f"{request.who} ({request.role})",
            "reason": request.reason,
            "state": request.state,
            "note": request.note,
        }
        for request in ControlQueue(run.folder).requests()
    ]
    configuration = run.configuration()
    names = [str(node["name"]) for node in configuration.get("nodes", ())][:MOST_NAMES]
    possible = exports(run)
    standing, offered = standings(run), OFFERED.get(str(top["state"]), set())
    if all(possible.values()):
        offered = offered - {"export"}
    elsewhere = no_continuation(run) if "continue" in offered else ""
    if elsewhere:
        offered = offered - {"continue"}
    revocable = [name for name in names if standing.get(name) != REVOKED]
    revoking = question.values.get("revoke")
    data = {
        **top,
        "offered": sorted(offered),
        "continued_elsewhere": elsewhere,
        "exports": possible,
        "standings": standing,
        "members": [name for name in names if name not in standing],
        "readmittable": [name for name in names if standing.get(name) not in (None, REVOKED)],
        "revocable": revocable,
        "revoking": revoking if "revoke" in offered and revoking in revocable else None,
        "deadline_now": configuration.get("deadline_seconds"),
        "quorum_now": configuration.get("quorum"),
    }
    table = make_table(
        "requests",
        "Requests",
        REQUESTS,
        rows,
        question.choice,
        empty="Nobody has asked anything of this run.",
        searchable=False,
    )
    return page_of(data, table)


def no_continuation(run: RunReader) -> str:
    """Why a run that has stopped is not continued from here; "" where it is."""
    # A simulation's clock is its own; devices that are real wait for real time.
    if not run.live().get("real_time"):
        return ""
    return (
        "devices took part in this run, and their server goes on with it: fedbraid server run, with the"
        " folder and the scenario that it began with, and --resume"
    )


def exports(run: RunReader) -> dict[str, str]:
    """Why each kind of export cannot be made of the last committed round; "" where it can."""
    rounds = run.rounds()
    entry = run.round_entry(rounds[-1]["round"]) if rounds else None
    if entry is None:
        return dict.fromkeys(EXPORTS, "no round is committed yet: there is nothing to export")
    content = entry["content"]
    adapted = bool(content.get("view_rank"))
    beyond = bool(content.get("seeds")) or any("dense" in (r.get("families") or {}) for r in rounds)
    if not adapted and not beyond:
        return dict.fromkeys(EXPORTS, "no update has changed the base model yet")
    why = (
        "the model's change is more than low-rank factors, so no adapter holds it: export it merged"
    )
    return {"peft": why if beyond else "", "merged": ""}


def scenario_names() -> list[str]:
    """Names of the scenarios that come with fedbraid."""
    folder = Path(fedserver.__file__).resolve().parent.parent / "simulations" / "scenarios"
    return sorted(path.stem for path in folder.glob("*.toml"))


def arguments_of(action: str, form: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of an action from a form's words.

    Raises:
        ControlError: a word that is no number where one is needed.
    """
    found: dict[str, Any] = {}
    if action in EXCLUDING or action == "readmit":
        found["node"] = form.get("node", "")
    for key, kind in (("deadline_seconds", float), ("quorum", int), ("round", int)):
        word = form.get(key, "").strip()
        fits = action == ("rollback" if key == "round" else "next_round")
        if word and fits:
            try:
                found[key] = kind(word)
            except ValueError:
                wanted = "a whole number" if kind is int else "a number of seconds"
                raise ControlError(f"{key.partition('_')[0]}: write {wanted}") from None
    return found
