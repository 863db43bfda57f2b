"""The OpenAPI document of ``/api/v1``, made from the same registry as the routes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fedserver.control import ARGUMENTS, EXPORTS
from fedserver.dashboard.registry import View

RUN = {
    "name": "run",
    "in": "path",
    "required": True,
    "description": "name of the run, as /api/v1/runs lists it",
    "schema": {"type": "string"},
}
ROUND_NUMBER = {
    "name": "round",
    "in": "path",
    "required": True,
    "schema": {"type": "integer", "minimum": 1},
}
TABLE = [
    {
        "name": "page",
        "in": "query",
        "description": "page of the tables, from 1",
        "schema": {"type": "integer", "minimum": 1},
    },
    {
        "name": "q",
        "in": "query",
        "description": "words that a row must hold",
        "schema": {"type": "string"},
    },
    {
        "name": "sort",
        "in": "query",
        "description": "column to sort by; a leading minus sorts down",
        "schema": {"type": "string"},
    },
]
SEVERAL_RUNS = {
    "name": "run",
    "in": "query",
    "description": "a run to compare; may be given several times",
    "schema": {"type": "array", "items": {"type": "string"}},
}

CSRF = {
    "name": "x-csrf-token",
    "in": "header",
    "description": "with a session: its token, which stands in every form; not with a bearer token",
    "schema": {"type": "string"},
}
FIELDS: dict[str, dict[str, Any]] = {
    "reason": {"type": "string", "maxLength": 500, "description": "stands in the ledger"},
    "node": {"type": "string", "description": "its name in the run's scenario"},
    "deadline_seconds": {"type": "number", "exclusiveMinimum": 0},
    "quorum": {"type": "integer", "minimum": 1, "description": "updates"},
    "round": {"type": "integer", "minimum": 0},
    "kind": {"type": "string", "enum": list(EXPORTS)},
    "scenario": {"type": "string", "description": "name of one that comes with fedbraid"},
    "name": {"type": "string", "maxLength": 64},
    "overrides": {"type": "string", "description": "KEY=VALUE a line"},
    "hours": {"type": "number", "exclusiveMinimum": 0, "description": "how long the token holds"},
    "token": {"type": "string", "description": "its id, as /api/v1/access lists it"},
}
"""What forms hold."""
OF_ACTION = {
    "pause": "before the next round",
    "resume": "with the next round",
    "stop": "after the round that is under way",
    "next_round": "another deadline or quorum, for that round alone",
    "drain": "keep a node out: it is to rest",
    "quarantine": "keep a node out: its updates are in doubt",
    "revoke": "keep a node out for good",
    "readmit": "let a node that was drained or quarantined take part again",
    "rollback": "the next round starts from the model after that one",
    "continue": "start a simulation that has stopped again",
    "export": "the model of the last committed round",
}
"""What operators do to a run."""
JOBS_OF = SEVERAL_RUNS | {"description": "a run whose jobs are asked for; by default all jobs"}


def document(views: Sequence[View], one_round: View) -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths: dict[str, Any] = {
        "/runs": _get("All runs, the newest first.", TABLE),
        "/runs.csv": _get("The same as CSV, whole.", TABLE[1:], csv=True),
        "/compare": _get("Runs over each other.", [SEVERAL_RUNS]),
        "/devices": _get("The deployment's nodes and open invitations.", TABLE),
        "/access": _get("Accounts and tokens, without secrets; for operators.", []),
        "/server": _get("This machine, the runs under way, and jobs.", [JOBS_OF, *TABLE]),
        "/runs/{run}/ledger/verify": _get("Hash every entry and blob again.", [RUN]),
    }
    for name in ("compared", "settings"):
        paths[f"/compare/{name}.csv"] = _get("A comparison's table.", [SEVERAL_RUNS], csv=True)
    for name in ("joined", "invited", "invitations"):
        paths[f"/devices/{name}.csv"] = _get("A table of the deployment as CSV.", [], csv=True)
    for name in ("accounts", "tokens", "record"):
        paths[f"/access/{name}.csv"] = _get("A table of it as CSV; for operators.", [], csv=True)
    for name in ("processes", "jobs"):
        paths[f"/server/{name}.csv"] = _get(
            "A table of it as CSV, whole.", [JOBS_OF, *TABLE[1:]], csv=True
        )
    replay = "The replay of a round, as far as it is: recorded and replayed digest."
    paths["/runs/{run}/rounds/{round}/replay"] = _get(replay, [RUN, ROUND_NUMBER])
    measured = "/runs/{run}/rounds/{round}/distances"
    paths[measured] = _get(
        "Distances between a round's updates, as far as they were measured.",
        [RUN, ROUND_NUMBER, *TABLE],
    )
    paths[f"{measured}/distances.csv"] = _get(
        "The same as CSV, whole.", [RUN, ROUND_NUMBER, *TABLE[1:]], csv=True
    )
    addresses = [(f"/runs/{{run}}/{view.name or 'live'}", view, [RUN]) for view in views]
    addresses.append(("/runs/{run}/rounds/{round}", one_round, [RUN, ROUND_NUMBER]))
    for address, view, parameters in addresses:
        summary = (view.make.__doc__ or view.title).strip().splitlines()[0]
        paths[address] = _get(summary, [*parameters, *TABLE])
        for table in view.tables:
            paths[f"{address}/{table}.csv"] = _get(
                f"The table '{table}' as CSV, whole.", [*parameters, *TABLE[1:]], csv=True
            )
    paths |= _forms()
    return {
        "openapi": "3.1.0",
        "info": {"title": "fedbraid dashboard", "version": _version()},
        "servers": [{"url": "/api/v1"}],
        "security": [{"token": []}, {"session": []}],
        "components": {
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": "__Host-fedbraid"},
            }
        },
        "paths": paths,
    }


def _get(summary: str, parameters: Sequence[dict[str, Any]], *, csv: bool = False) -> Any:
    kind = "text/csv" if csv else "application/json"
    schema = {"type": "string"} if csv else {"type": "object"}
    return {
        "get": {
            "summary": summary,
            "parameters": list(parameters),
            "responses": {
                "200": {"description": "as described", "content": {kind: {"schema": schema}}},
                "401": {"description": "no credentials"},
                "404": {"description": "there is no such run, round or table"},
            },
        }
    }


def _forms() -> dict[str, Any]:
    """Where operators' forms are sent; these addresses stand beside ``/api/v1``, not below it."""
    found = {}
    for action, text in OF_ACTION.items():
        needed = {"rollback": ["round"], "export": ["kind"]}.get(action, [])
        fields = ["deadline_seconds", "quorum"] if action == "next_round" else needed
        if "node" in ARGUMENTS[action]:
            fields = needed = ["node"]
        done = "202", "queued or begun; as JSON for who accepts it, else 303 to the run's page"
        summary = f"{action.replace('_', ' ').capitalize()}: {text}."
        found[f"/runs/{{run}}/actions/{action}"] = _post(summary, fields, needed, done, [RUN])
    seen = "303", "to the page on which its progress is seen"
    measuring = "202", "begun; as JSON for who accepts it, else 303 to the page"
    issued = (
        "201",
        "the token, shown once; for a session that does not accept JSON 303 to the page that has it",
    )
    found |= {
        "/start": _post(
            "Start a simulation.", ["scenario", "name", "overrides"], ["scenario", "name"], seen, []
        ),
        "/runs/{run}/ledger/replay": _post(
            "Replay a run to a round.", ["round"], ["round"], seen, [RUN], reason=False
        ),
        "/runs/{run}/robustness/measure": _post(
            "Measure distances.", ["round"], ["round"], measuring, [RUN], reason=False
        ),
        "/devices/invite": _post(
            "Issue an enrolment token.", ["name", "hours"], ["name"], issued, []
        ),
        "/access/revoke": _post("End a program's token.", ["token"], ["token"], seen, []),
    }
    return found


def _post(
    summary: str,
    fields: Sequence[str],
    needed: Sequence[str],
    done: tuple[str, str],
    parameters: Sequence[dict[str, Any]],
    *,
    reason: bool = True,
) -> Any:
    why = ["reason"] if reason else []
    schema = {
        "type": "object",
        "properties": {name: FIELDS[name] for name in [*fields, *why]},
        "required": [*needed, *why],
    }
    content = {"application/x-www-form-urlencoded": {"schema": schema}}
    missing = {"404": {"description": "there is no such run"}} if parameters else {}
    return {
        "servers": [{"url": "/"}],
        "post": {
            "summary": summary,
            "parameters": [*parameters, CSRF],
            "requestBody": {"required": True, "content": content},
            "responses": {
                done[0]: {"description": done[1]},
                "401": {"description": "no credentials"},
                "403": {"description": "not an operator, or a form of another session"},
                **missing,
                "409": {"description": "refused; it says why"},
            },
        },
    }


def _version() -> str:
    try:
        return version("fedbraid")
    except PackageNotFoundError:
        return "unknown"
