"""The OpenAPI document of ``/api/v1``, made from the same registry as the routes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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


def _version() -> str:
    try:
        return version("fedbraid")
    except PackageNotFoundError:
        return "unknown"
