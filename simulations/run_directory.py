"""What a run left on disk, read leniently: a report of half a run is worth having.

Nothing here trusts the files. Node names, reasons and answers come from other machines, a killed
run leaves a short ``metrics.jsonl``, and older runs lack newer keys: what cannot be read becomes
None and one line of ``problems``, never an exception.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedserver.control import OPERATOR
from fedserver.ledger import Entry, Ledger, LedgerError
from fedserver.ledger_database import DATABASE
from fedserver.model_line import ModelLine, rolled_back_to
from fedserver.wording import action_words

# Control characters, bidirectional overrides and lone surrogates: invalid in HTML or UTF-8, or
# able to show a text other than the one that is there.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
FILES = ("scenario.toml", "metrics.jsonl", "summary.json")
ADAPTER = "adapter"
MISSING = {
    "metrics.jsonl": ": no round was committed",
    "summary.json": ": the run has not finished",
}


class RunDirectoryError(Exception):
    """The folder does not exist or is not a run's; the message names it and what to do."""


@dataclass(frozen=True)
class NodeRound:
    """One node's part of one round. ``weight`` is its share of the aggregate.

    ``memory_bytes``: by the model of the plan's cost; ``memory_grown``: by how much the process grew.
    """

    node: str
    sends: str
    examples: int | None
    weight: float | None
    train_loss_first: float | None
    train_loss: float | None
    bytes_up: int | None
    bytes_down: int | None
    seconds: float | None
    norm: float | None
    verdict: str
    reason: str
    categories: str
    base_format: str
    choice: str
    memory_bytes: int | None
    memory_grown: int | None


@dataclass(frozen=True)
class Round:
    """One line of ``metrics.jsonl``; evaluation is that of the model after the round."""

    round: int
    quorum: bool
    loss: float | None
    eval_loss: float | None
    eval_accuracy: float | None
    bytes_up: int | None
    bytes_down: int | None
    seconds: float | None
    device_seconds: float | None
    accepted: int | None
    rejected: int | None
    epsilon: float | None
    carry_rank: int | None
    tail_energy: float | None
    families: tuple[tuple[str, int], ...]
    head: str
    nodes: tuple[NodeRound, ...]


@dataclass(frozen=True)
class Quality:
    """One evaluation: nats per answer token, its exponential, share of tokens right, tokens.

    ``new_loss`` is over the ``new_tokens`` of examples that the training data do not repeat; ``nodes``:
    how many evaluated.
    """

    loss: float | None
    perplexity: float | None
    accuracy: float | None
    tokens: int | None
    new_loss: float | None = None
    new_tokens: int | None = None
    nodes: int | None = None


@dataclass(frozen=True)
class Operation:
    """What an operator did, and the round of its entry, before which it holds. ``back_to``: of a
    roll-back the round that it went to."""

    round: int
    action: str
    who: str
    role: str
    reason: str
    back_to: int | None = None

    @property
    def back_words(self) -> str:
        """Of a roll-back: "back to round 2"."""
        return f"back to {f'round {self.back_to}' if self.back_to else 'the base model'}"


@dataclass(frozen=True)
class Sample:
    """A question answered by the base model and by the tuned one; ``expected`` is the data's."""

    question: str
    base: str
    tuned: str
    expected: str
    category: str


@dataclass(frozen=True)
class Run:
    """A run directory. ``scenario`` is the resolved TOML as text, ``settings`` the same parsed.

    ``evaluated``: the newest model that was evaluated, of those that the run's model came by, and its
    round. ``adapter``: the folder of an exported one, "" where there is none.
    """

    path: Path
    name: str
    preset: str
    seed: int | None
    planned_rounds: int | None
    rounds: tuple[Round, ...]
    before: Quality | None
    after: Quality | None
    evaluated: tuple[int, Quality] | None
    operations: tuple[Operation, ...]
    adapter: str
    samples: tuple[Sample, ...]
    scenario: str
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    problems: tuple[str, ...]

    def number(self, key: str) -> float | None:
        """A finite number of ``summary.json``."""
        return number(self.summary.get(key))

    def word(self, key: str) -> str:
        """A text of ``summary.json``, "" where it is missing."""
        return text(self.summary.get(key))

    @property
    def rollbacks(self) -> list[Operation]:
        """Where the run went on from an earlier model."""
        return [one for one in self.operations if one.back_to is not None]

    def line(self) -> ModelLine:
        """The rounds that the model came by."""
        return _line(self.rounds, self.operations)

    def curve(self) -> list[tuple[int, float]]:
        """Evaluation loss over rounds; round 0 is the base model."""
        points = {r.round: r.eval_loss for r in self.rounds if r.eval_loss is not None}
        if self.before and self.before.loss is not None:
            points[0] = self.before.loss
        last = self.rounds[-1].round if self.rounds else 0
        if last and last not in points and self.after and self.after.loss is not None:
            points[last] = self.after.loss
        return sorted(points.items())


def read_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        RunDirectoryError: there is no such folder, or none of a run's files is in it.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"{path}: no such run directory")
    if not any((path / name).is_file() for name in FILES):
        raise RunDirectoryError(
            f"{path}: holds no scenario.toml, metrics.jsonl or summary.json; give the folder that"
            " 'fedbraid simulate' wrote"
        )
    problems: list[str] = []
    scenario = text(_read(path / "scenario.toml", problems), multiline=True)
    settings = _toml(scenario, problems)
    summary = _json(path / "summary.json", problems)
    summary = summary if isinstance(summary, dict) else {}
    # A run may be asked for no samples, so their absence is nothing to complain of.
    samples = _json(path / "samples.json", problems) if (path / "samples.json").exists() else None
    rounds = _rounds(path / "metrics.jsonl", problems)
    operations = _operations(path, problems)
    return Run(
        path=path,
        name=text(summary.get("name")) or text(settings.get("name")) or text(path.resolve().name),
        preset=text(summary.get("preset")) or text(settings.get("preset")),
        seed=integer(settings.get("seed")),
        planned_rounds=integer(settings.get("rounds")) or integer(summary.get("rounds")),
        rounds=rounds,
        before=_quality(summary.get("before")),
        after=_quality(summary.get("after")),
        evaluated=_evaluated(summary, rounds, operations),
        operations=operations,
        adapter=ADAPTER if (path / ADAPTER / "adapter_config.json").is_file() else "",
        samples=tuple(
            Sample(
                text(item.get("question"), multiline=True),
                text(item.get("base"), multiline=True),
                text(item.get("tuned"), multiline=True),
                text(item.get("expected"), multiline=True),
                text(item.get("category")),
            )
            for item in (samples if isinstance(samples, list) else [])
            if isinstance(item, dict)
        ),
        scenario=scenario,
        settings=settings,
        summary=summary,
        problems=tuple(problems),
    )


def text(value: object, *, multiline: bool = False) -> str:
    """A text without characters that HTML forbids or that change the direction of others."""
    if not isinstance(value, str):
        return ""
    clean = _UNSAFE.sub("\ufffd", value.replace("\r\n", "\n"))
    return clean if multiline else " ".join(clean.split())


def number(value: object) -> float | None:
    """A finite float (or an integer, kept as it is), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def integer(value: object) -> int | None:
    """An integer of at most 64 bits, else None."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        return None
    return value


def _read(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing{MISSING.get(path.name, '')}")
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror}")
    return ""


def _json(path: Path, problems: list[str]) -> object:
    content = _read(path, problems)
    if not content:
        return None
    try:
        value: object = json.loads(content)
    except (ValueError, RecursionError):
        problems.append(f"{path.name} is not valid JSON")
        return None
    return value


def _toml(content: str, problems: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError:
        problems.append("scenario.toml is not valid TOML; it is shown as it is")
    except RecursionError:
        problems.append("scenario.toml is nested too deeply; it is shown as it is")
    return {}


def _rounds(path: Path, problems: list[str]) -> tuple[Round, ...]:
    # A resumed run may write a round again: the last line of a round is the one that counts.
    found: dict[int, Round] = {}
    for index, line in enumerate(_read(path, problems).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        round_number = integer(values.get("round")) if isinstance(values, dict) else None
        if round_number is None or round_number < 0:
            problems.append(f"metrics.jsonl line {index} is not a round")
            continue
        found[round_number] = _round(round_number, values)
    return tuple(found[key] for key in sorted(found))


def _round(round_number: int, values: Mapping[str, Any]) -> Round:
    families, nodes = values.get("families"), values.get("nodes")
    return Round(
        round=round_number,
        quorum=values.get("quorum") is not False,
        loss=number(values.get("loss")),
        eval_loss=number(values.get("eval_loss")),
        eval_accuracy=number(values.get("eval_accuracy")),
        bytes_up=integer(values.get("bytes_up")),
        bytes_down=integer(values.get("bytes_down")),
        seconds=number(values.get("seconds")),
        device_seconds=number(values.get("device_seconds")),
        accepted=integer(values.get("accepted")),
        rejected=integer(values.get("rejected")),
        epsilon=number(values.get("epsilon")),
        carry_rank=integer(values.get("carry_rank")),
        tail_energy=number(values.get("tail_energy")),
        families=tuple(
            (text(name), count)
            for name, value in (families.items() if isinstance(families, dict) else ())
            if (count := integer(value)) is not None
        ),
        head=text(values.get("head")),
        nodes=tuple(
            _node(item)
            for item in (nodes if isinstance(nodes, list) else ())
            if isinstance(item, dict)
        ),
    )


def _operations(path: Path, problems: list[str]) -> tuple[Operation, ...]:
    if not (path / DATABASE).is_file():
        return ()
    try:
        ledger = Ledger(path)
    except LedgerError as error:
        problems.append(f"{DATABASE} could not be read: {text(str(error))}")
        return ()
    try:
        return tuple(_operation(entry) for entry in ledger.entries(OPERATOR))
    except LedgerError as error:
        problems.append(f"{DATABASE} could not be read: {text(str(error))}")
        return ()
    finally:
        ledger.close()


def _operation(entry: Entry) -> Operation:
    who, role, reason = (text(entry.content.get(key)) for key in ("who", "role", "reason"))
    back_to = rolled_back_to(entry)
    return Operation(entry.round, text(action_words(entry.content)), who, role, reason, back_to)


def _line(rounds: Sequence[Round], operations: Sequence[Operation]) -> ModelLine:
    line = ModelLine()
    waiting = [one for one in operations if one.back_to is not None]
    known = {0}
    for entry in (*rounds, None):
        while waiting and (entry is None or waiting[0].round <= entry.round):
            target = waiting.pop(0).back_to or 0
            # A file that lost lines may lack the round.
            if target in known:
                line.roll_back(target)
        if entry is not None:
            line.commit(entry.round, quorum=entry.quorum)
            known.add(entry.round)
    return line


def _evaluated(
    summary: Mapping[str, Any], rounds: Sequence[Round], operations: Sequence[Operation]
) -> tuple[int, Quality] | None:
    told = summary.get("last_evaluation")
    if isinstance(told, dict) and summary.get("rounds") == len(rounds):
        number_told, quality = integer(told.get("round")), _quality(told)
        return None if number_told is None or quality is None else (number_told, quality)
    line = _line(rounds, operations).rounds
    for entry in reversed(rounds):
        if entry.round in line and entry.eval_loss is not None:
            found = _quality({"loss": entry.eval_loss, "accuracy": entry.eval_accuracy})
            return None if found is None else (entry.round, found)
    return None


def _node(values: Mapping[str, Any]) -> NodeRound:
    return NodeRound(
        node=text(values.get("node")) or "unnamed",
        sends=text(values.get("sends")) or "",
        examples=integer(values.get("examples")),
        weight=number(values.get("weight")),
        train_loss_first=number(values.get("train_loss_first")),
        train_loss=number(values.get("train_loss")),
        bytes_up=integer(values.get("bytes_up")),
        bytes_down=integer(values.get("bytes_down")),
        seconds=number(values.get("seconds")),
        norm=number(values.get("norm")),
        verdict=text(values.get("verdict")) or "unknown",
        reason=text(values.get("reason")),
        categories=text(values.get("categories")),
        base_format=text(values.get("base_format")),
        choice=text(values.get("choice")),
        memory_bytes=integer(values.get("memory_bytes")),
        memory_grown=integer(values.get("memory_grown")),
    )


def _quality(value: object) -> Quality | None:
    if not isinstance(value, dict):
        return None
    loss, perplexity = number(value.get("loss")), number(value.get("perplexity"))
    if perplexity is None and loss is not None and loss < 700:
        perplexity = math.exp(loss)
    quality = Quality(
        loss=loss,
        perplexity=perplexity,
        accuracy=number(value.get("accuracy")),
        tokens=integer(value.get("tokens")),
        new_loss=number(value.get("new_loss")),
        new_tokens=integer(value.get("new_tokens")),
        nodes=integer(value.get("nodes")),
    )
    return quality if quality.loss is not None or quality.accuracy is not None else None
