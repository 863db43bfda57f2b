"""Which routes answer somebody who shows no credentials: health, readiness and the sign-in page."""

from __future__ import annotations

import re
import time
from http import HTTPStatus

from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from fedhost.enrolment import AUTHORITY_ROUTE, JOIN_ROUTE, LEAVE_ROUTE, NODE_ROUTE
from fedserver.dashboard.accounts import Accounts
from fedserver.dashboard.application import make_application
from simulations.benchmarks.edge.server import Door, Server

OPEN = ("/health", "/ready")
OTHERS = (
    "/", "/docs", "/openapi.json", "/gatekeeper", "/check", "/v1/runtime/responses", "/v1/fleet/",
    "/v1/fleet//pull-messages", "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/list-runs",
    "/health/../v1/control/list-runs", "/enrol/", AUTHORITY_ROUTE, JOIN_ROUTE, LEAVE_ROUTE, NODE_ROUTE,
)  # fmt: skip
REFUSALS = (401, 403, 404)
BUSY_SECONDS, BUSY_ATTEMPTS = 0.5, 20


def open_routes(server: Server) -> tuple[int, dict[str, int]]:
    """How many requests were made, and those that were not refused, with their status.

    Every route of Flower's three interfaces and of ours, by GET and by POST with an empty message.
    """
    door = Door(server)
    paths = sorted({path for _, path in PROTOBUF_REQUEST_TYPES} | set(OTHERS))
    answered: dict[str, int] = {}
    made = 0
    for path in paths:
        for method in ("GET", "POST"):
            headers = {"Content-Type": PROTOBUF_MEDIA_TYPE, "Content-Length": "0"}
            status = _status(door, method, path, headers)
            made += 1
            if status not in REFUSALS:
                answered[f"{method} {path}"] = status
    for path in OPEN:
        status = _status(door, "GET", path, {})
        if status != 200:
            answered[f"GET {path}"] = status
    door.close()
    seen, shown = _dashboard_routes(server)
    return made + seen, answered | shown


def _dashboard_routes(server: Server) -> tuple[int, dict[str, int]]:
    """The same of the dashboard, every route by every method; anybody may see the page to sign in."""
    runs = server.folder.runs
    door = Door(server, port=int(server.settings.dashboard.rpartition(":")[2]))
    answered: dict[str, int] = {}
    made = 0
    for route in make_application(runs, Accounts(runs)).routes:
        path = re.sub(r"\{round(:int)?\}", "1", getattr(route, "path", "/"))
        path = re.sub(r"\{\w+\}", "any", path)
        for method in ("GET", "POST"):
            status = _status(door, method, path, {"Content-Length": "0"})
            made += 1
            page = path.startswith(("/login", "/static"))
            if status not in REFUSALS and not (page and method == "GET"):
                answered[f"{method} {path}"] = status
    if (status := _status(door, "GET", "/login", {})) != HTTPStatus.OK:
        answered["GET /login"] = status
    door.close()
    return made, answered


def _status(door: Door, method: str, path: str, headers: dict[str, str]) -> int:
    """The answer once the limit of rates, which comes first, lets the request through."""
    for _ in range(BUSY_ATTEMPTS):
        status, _ = door.ask(method, path, headers)
        if status != HTTPStatus.SERVICE_UNAVAILABLE:
            break
        time.sleep(BUSY_SECONDS)
    return status
