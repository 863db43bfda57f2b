"""Scenario files: found, read with overrides, and written."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedserver.scenario.explanation import explain
from fedserver.scenario.mistakes import ConfigurationError, nearest
from fedserver.scenario.run import RunConfiguration

SCENARIO_FOLDER = Path(__file__).resolve().parents[2] / "simulations" / "scenarios"


def scenario_names() -> list[str]:
    """Names of the scenarios that come with fedbraid."""
    return sorted(path.stem for path in SCENARIO_FOLDER.glob("*.toml"))


def scenario_path(reference: str) -> Path:
    """The file of a scenario given by path or by name."""
    path = Path(reference).expanduser()
    if path.is_file():
        return path
    named = SCENARIO_FOLDER / f"{reference}.toml"
    if named.is_file():
        return named
    hint = nearest(reference, scenario_names())
    raise ConfigurationError(
        f"no scenario {reference!r}: neither a file nor one of {', '.join(scenario_names())}{hint}"
    )


def load(reference: str, overrides: Sequence[str] = ()) -> RunConfiguration:
    """Read a scenario and apply ``key=value`` overrides (dotted keys, TOML values)."""
    path = scenario_path(reference)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not a TOML file: {error}") from None
    values.setdefault("name", path.stem)
    for override in overrides:
        _override(values, override)
    return parse(values, source=str(path))


def parse(values: Mapping[str, Any], source: str = "scenario") -> RunConfiguration:
    """Validate a mapping; every problem is listed at once, with the nearest known key."""
    try:
        return RunConfiguration.model_validate(values)
    except ValidationError as error:
        problems = explain(error.errors())
        listed = problems[0] if len(problems) == 1 else "".join(f"\n  {one}" for one in problems)
        raise ConfigurationError(f"{source}: {listed}") from None


def to_toml(configuration: RunConfiguration) -> str:
    """The resolved scenario as TOML: parsing it gives the same configuration."""
    values = configuration.model_dump(mode="json", exclude_none=True)
    nodes = values.pop("nodes")
    tables = {key: values.pop(key) for key in list(values) if isinstance(values[key], dict)}
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    for key, table in tables.items():
        lines += ["", f"[{key}]", *(f"{name} = {_toml(value)}" for name, value in table.items())]
    for node in nodes:
        lines += ["", "[[nodes]]", *(f"{key} = {_toml(value)}" for key, value in node.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, str):
        # An unescaped JSON string is a TOML basic string, except that TOML forbids a raw DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigurationError(f"--set {override!r}: write key=value, for example rounds=5")
    text = text.strip()
    target: Any = values
    where: list[int | str] = []
    *parents, last = key.strip().split(".")
    for parent in parents:
        step = _step(target, parent, override)
        target = target[step]
        where.append(step)
    if isinstance(target, list):
        raise ConfigurationError(
            f"--set {override!r}: name one entry, for example nodes.0.lora_r=4"
        )
    try:
        target[last] = value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        target[last] = text
        return
    # A word may look like TOML, as nan, 2024 or true do, where a text is wanted: what fits counts.
    if _refused(values, [*where, last]):
        target[last] = text
        if _refused(values, [*where, last]):
            target[last] = value


def _refused(values: Mapping[str, Any], where: Sequence[int | str]) -> bool:
    """Whether the value at a place of the scenario is not valid there."""
    try:
        RunConfiguration.model_validate(values)
    except ValidationError as error:
        return any(problem["loc"][: len(where)] == tuple(where) for problem in error.errors())
    return False


def _step(target: Any, part: str, override: str) -> int | str:
    """The index or key that ``part`` means in a list or table, made where a table is missing."""
    if isinstance(target, list):
        by_name = [index for index, entry in enumerate(target) if entry.get("name") == part]
        if by_name:
            return by_name[0]
        if part.isdigit() and int(part) < len(target):
            return int(part)
        raise ConfigurationError(f"--set {override!r}: there is no entry {part!r}")
    if not isinstance(target.setdefault(part, {}), (dict, list)):
        raise ConfigurationError(f"--set {override!r}: {part!r} is a value, not a table")
    return part
