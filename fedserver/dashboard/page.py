"""What a view returns: plain data and tables. HTML, JSON and CSV are three ways to write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import quote

from fedserver.dashboard.run_reader import RunReader
from fedserver.dashboard.tables import Choice, Table


@dataclass(frozen=True)
class Question:
    """A reader's parameters: the table's choice, the values of the address, the round of the path.

    ``measured``: the distances between updates that somebody had measured, as ``Measurements.told`` has
    them; nothing of other views.
    """

    choice: Choice = field(default_factory=Choice)
    values: Mapping[str, str] = field(default_factory=dict)
    runs: tuple[str, ...] = ()
    round: int = 0
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """``data`` is JSON as it stands; ``tables`` by name."""

    data: dict[str, Any]
    tables: dict[str, Table] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The JSON twin of the page."""
        return {**self.data, "tables": {name: table.json() for name, table in self.tables.items()}}


class NotThere(Exception):
    """The view has nothing of that name; becomes 404 with this text."""


RunView: TypeAlias = Callable[[RunReader, Question], Page]


def run_address(name: str, *parts: object) -> str:
    """The address of a run's page."""
    return "/".join(["/runs", quote(name, safe="~:"), *map(str, parts)])


def page_of(data: dict[str, Any], *tables: Table) -> Page:
    """A page with its tables by their names."""
    return Page(data, {table.name: table for table in tables})
