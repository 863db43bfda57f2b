"""Every view once: its address, what it returns, its template. Pages, JSON, CSV and OpenAPI follow."""

from __future__ import annotations

from dataclasses import dataclass

from fedserver.dashboard import actions, ledger_views, node_views, round_views
from fedserver.dashboard.page import RunView


@dataclass(frozen=True)
class View:
    """A view of a run at ``/runs/RUN/NAME``; "" is the live one. ``title`` stands in the navigation."""

    name: str
    title: str
    make: RunView
    tables: tuple[str, ...]

    @property
    def template(self) -> str:
        """Its template."""
        return f"{self.name or 'live'}.html.jinja"


VIEWS = (
    View("", "Live", round_views.live, ("arrivals",)),
    View("rounds", "Rounds", round_views.rounds, ("rounds",)),
    View("fleet", "Fleet", node_views.fleet, ("fleet",)),
    View("plan", "Plan", node_views.plan, ("plan",)),
    View("privacy", "Privacy", node_views.privacy, ("participation",)),
    View("robustness", "Robustness", node_views.robustness, ("influence",)),
    View("ledger", "Ledger", ledger_views.ledger, ("entries", "actions")),
    View("log", "Log", ledger_views.log, ("log",)),
    View("control", "Control", actions.control, ("requests",)),
)
ROUND = View("round", "Round", round_views.one_round, ("nodes",))
BY_NAME = {view.name: view for view in VIEWS}
