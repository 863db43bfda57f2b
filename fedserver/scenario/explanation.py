"""The problems that a strict reading finds, a line each: where, what to write, and what was there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from aggregators.presets import STRANDS
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
# What to write, by pydantic's kind of problem; fields in braces are of its context.
WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text in quotes",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-' alone, a letter or digit first",
    "string_unicode": "a text of whole characters",
    "tuple_type": "a list in brackets",
    "list_type": "a list in brackets",
    "dict_type": "a table of keys and values",
    "model_type": "a table of keys and values",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} at most",
}
SHOWN_LIMIT = 60  # characters of what was there


def explain(problems: Sequence[Mapping[str, Any]]) -> list[str]:
    """pydantic's problems as lines, one a place; what fits none of a union's kinds is one problem."""
    places: dict[str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        places.setdefault(_place(problem), []).append(problem)
    for place, found in list(places.items()):
        # A list is also too short by an entry that is wrong.
        short = found[0]["type"] in ("too_short", "missing")
        if short and any(other.startswith(f"{place}.") for other in places):
            del places[place]
    # What is of the whole scenario names its keys itself.
    return [
        f"{place}: {_what(found)}" if place else _what(found) for place, found in places.items()
    ]


def _place(problem: Mapping[str, Any]) -> str:
    return ".".join(map(str, _location(problem)))


def _location(problem: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Where a problem is, without the names that pydantic gives to a union's kinds."""
    model: Any = RunConfiguration
    location: tuple[int | str, ...] = problem["loc"]
    if problem["type"] == "missing" and isinstance(location[-1], int):
        location = location[:-1]
    for depth, part in enumerate(location):
        if model is not None and isinstance(part, str):
            if part not in model.model_fields:
                return location[: depth + 1]
            table = TABLES.get(part) if depth == 0 else None
            if table is None:
                # Of a value only the places in a list or the keys of a table are of the scenario.
                return location[: depth + 1] + _inside(location[depth + 1 :])
            model = table
    return location


def _inside(rest: Sequence[int | str]) -> tuple[int | str, ...]:
    """The place in a list, or the key of a table of factors; () for the name of a union's kind."""
    if rest and (isinstance(rest[0], int) or rest[0] in STRANDS or rest[-1] == "[key]"):
        return (rest[0],)
    return ()


def _what(problems: Sequence[Mapping[str, Any]]) -> str:
    """What to do at one place. A union has a problem for each kind that it could have been."""
    first = problems[0]
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unknown key{_suggestion(first['loc'])}"
    if first["type"] == "missing":
        inner = isinstance(first["loc"][-1], int)
        return "entries are missing; add them" if inner else "missing; give it a value"
    words = [word for problem in problems for word in _words(problem)]
    wanted = [_wanted(p) for p in problems if p["type"] != "literal_error"]
    if "a number" in wanted:
        wanted = [one for one in wanted if one != "a whole number"]
    wanted = list(dict.fromkeys([*map(repr, words), *wanted]))
    listed = " or ".join(filter(None, [", ".join(wanted[:-1]), wanted[-1]]))
    shown = repr(first.get("input"))
    shown = shown if len(shown) <= SHOWN_LIMIT else shown[:SHOWN_LIMIT] + " ..."
    near = nearest(first["input"], words) if isinstance(first.get("input"), str) else ""
    return f"write {listed}, not {shown}{near}"


def _wanted(problem: Mapping[str, Any]) -> str:
    known = WANTED.get(problem["type"], "what 'fedbraid schema' allows here")
    context = problem.get("ctx", {})
    numbers = {key: f"{n:g}" if isinstance(n, float) else n for key, n in context.items()}
    return known.format(**numbers)


def _words(problem: Mapping[str, Any]) -> list[str]:
    """The words that a literal may be."""
    if problem["type"] != "literal_error":
        return []
    return [word.strip("' ") for word in problem["ctx"]["expected"].replace(" or ", ",").split(",")]


def _suggestion(location: Sequence[int | str]) -> str:
    """The nearest key of the same table, or the same key in the table where it belongs."""
    key = str(location[-1])
    for table, model in TABLES.items():
        if key in model.model_fields and key not in _keys_at(location):
            return f"; did you mean '{'nodes.NAME' if table == 'nodes' else table}.{key}'?"
    return nearest(key, _keys_at(location)) or "; leave it out"


def _keys_at(location: Sequence[int | str]) -> list[str]:
    table = TABLES.get(str(location[0])) if len(location) > 1 else None
    return list((table or RunConfiguration).model_fields)
