"""What a run's files say, as far as it is of the kind that it should be; what is not counts as absent.

A log may be damaged, or written by another version; one value of it must not take a page away from the
others. Numbers that are not finite stay where a loss may be one. No integer is beyond what a float holds
exactly, and every time stamp is a date.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from fedserver import events
from fedserver.dashboard.run_files import Row

LARGEST = 1 << 53
LAST_MOMENT = 253402300799.0
"""The end of the year 9999, in seconds since 1970."""

Kind = Callable[[Any], bool]


def text(value: Any) -> bool:
    """A text."""
    return type(value) is str


def flag(value: Any) -> bool:
    """True or false."""
    return type(value) is bool


def whole(value: Any) -> bool:
    """An integer, of either sign."""
    return type(value) is int and -LARGEST < value < LARGEST


def count(value: Any) -> bool:
    """An integer from 0 on."""
    return type(value) is int and 0 <= value < LARGEST


def number(value: Any) -> bool:
    """A number, also one that is not finite."""
    return type(value) is float or whole(value)


def finite(value: Any) -> bool:
    """A number that is one."""
    return number(value) and math.isfinite(value)


def moment(value: Any) -> bool:
    """Seconds since 1970, of a date that can be written."""
    return number(value) and 0 <= value <= LAST_MOMENT


def tally(value: Any) -> bool:
    """Counts by name."""
    return type(value) is dict and all(map(count, value.values()))


LIVE: dict[str, Kind] = {
    **dict.fromkeys(("name", "preset", "base_model", "state", "phase", "reason", "head"), text),
    **dict.fromkeys(("process", "host"), text),
    **dict.fromkeys(("rounds", "first_round", "nodes", "committed", "round", "asked", "quorum"), count),
    **dict.fromkeys(("model_bytes_a_node", "lora_bytes_a_rank"), count),
    **dict.fromkeys(("run_offset", "round_offset"), count),
    **dict.fromkeys(("started", "updated", "phase_started", "round_started"), moment),
    "deadline_seconds": finite,
    "real_time": flag,
    "seed": whole,
}  # fmt: skip
SUMMARY: dict[str, Kind] = {
    **dict.fromkeys(("name", "preset", "base_model"), text),
    **dict.fromkeys(("rounds", "nodes", "bytes_up", "bytes_down"), count),
    "seed": whole,
    "seconds": finite,
    "eval_loss": number,
    "before": lambda value: type(value) is dict and number(value.get("loss")),
}
ROUND: dict[str, Kind] = {
    **dict.fromkeys(("round", "bytes_up", "bytes_down", "accepted", "rejected"), count),
    **dict.fromkeys(("asked", "asked_ranks", "carry_rank"), count),
    **dict.fromkeys(("loss", "eval_loss", "eval_accuracy", "epsilon", "tail_energy"), number),
    "seconds": finite,
    "families": tally,
    "head": text,
}
NODE: dict[str, Kind] = {
    **dict.fromkeys(("node", "family", "verdict", "reason", "sends"), text),
    **dict.fromkeys(("examples", "bytes_up", "bytes_down", "staleness", "memory_bytes"), count),
    **dict.fromkeys(("weight", "norm", "train_loss_first", "train_loss"), number),
    "seconds": finite,
}
ANY_EVENT: dict[str, Kind] = {"time": moment, "round": whole, "node": text}
OF_ANNOTATION: dict[str, Kind] = {
    "str": text,
    "int": whole,
    "bool": flag,
    "float": lambda value: value is None or number(value),
    "int | None": lambda value: value is None or whole(value),
    "float | None": lambda value: value is None or number(value),
}


def sound(told: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Row:
    """The same without values that are not of their kinds; what has no kind stays."""
    return {k: v for k, v in told.items() if k not in kinds or kinds[k](v)}


def sound_round(told: Row) -> Row:
    """A line of metrics, with None for what it does not say."""
    found = dict.fromkeys(ROUND) | sound(told, ROUND)
    return found if flag(found.get("quorum")) else {k: v for k, v in found.items() if k != "quorum"}


def sound_nodes(told: object) -> list[Row]:
    """The nodes of such a line, those that have a name."""
    nodes = told if isinstance(told, list) else []
    named = [node for node in nodes if isinstance(node, dict) and text(node.get("node"))]
    return [dict.fromkeys(NODE) | sound(node, NODE) for node in named]


def sound_event(told: Row) -> Row:
    """A line of the log."""
    return sound(told, EVENTS.get(str(told.get("event")), ANY_EVENT))


def sound_members(told: object) -> list[Row]:
    """The nodes of the event with which a run begins, those that have a name."""
    nodes = told if isinstance(told, list) else []
    named = [node for node in nodes if isinstance(node, dict) and text(node.get("node"))]
    return [sound(node, MEMBER) for node in named]


def plain(value: Any) -> Any:
    """The same as JSON can hold it: numbers that are not finite become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _of_fields(kind: type) -> dict[str, Kind]:
    annotated = {part.name: str(part.type) for part in fields(kind)}
    return {n: OF_ANNOTATION[a] for n, a in annotated.items() if a in OF_ANNOTATION}


EVENTS = {name: ANY_EVENT | _of_fields(kind) for name, kind in events.KINDS.items()}
MEMBER = _of_fields(events.NodeInfo)
