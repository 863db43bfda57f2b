"""The problems that a strict reading finds, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from fedserver.scenario.data import DataConfiguration
from fedserver.scenario.mistakes import nearest
from fedserver.scenario.nodes import NodeConfiguration
from fedserver.scenario.run import RunConfiguration
from fedserver.scenario.strands import (
    MixingConfiguration,
    ProjectedConfiguration,
    ZerothOrderConfiguration,
)

TABLES: dict[str, type[BaseModel]] = {
    "data": DataConfiguration,
    "zeroth_order": ZerothOrderConfiguration,
    "projected": ProjectedConfiguration,
    "mixing": MixingConfiguration,
    "nodes": NodeConfiguration,
}


def explain(problem: Mapping[str, Any]) -> str:
    """One problem of pydantic's as a line: where, what, and the nearest known key."""
    location = problem["loc"]
    where = ".".join(str(part) for part in location) or "scenario"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{_suggestion(location)}"
    if problem["type"] == "missing":
        return f"{where}: missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    shown = problem.get("input")
    suffix = f" (got {shown!r})" if isinstance(shown, (int, float, str)) else ""
    return f"{where}: {message}{suffix if 'Value error' not in problem['msg'] else ''}"


def _suggestion(location: Sequence[int | str]) -> str:
    """The nearest key of the same table, or the same key in the table where it belongs."""
    key = str(location[-1])
    for table, model in TABLES.items():
        if key in model.model_fields and key not in _keys_at(location):
            return f"; did you mean '{'nodes.NAME' if table == 'nodes' else table}.{key}'?"
    return nearest(key, _keys_at(location))


def _keys_at(location: Sequence[int | str]) -> list[str]:
    table = TABLES.get(str(location[0])) if len(location) > 1 else None
    return list((table or RunConfiguration).model_fields)
