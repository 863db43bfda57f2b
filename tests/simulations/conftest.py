"""Generators of run directories and of events: what a run leaves and tells, without a run."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedserver import events


@dataclass(frozen=True)
class FakeNode:
    """A node of the generated run and what happens to its reply in one round."""

    name: str
    rank: int
    categories: tuple[str, ...]
    description: str = "laptop"
    refused_in: int | None = None
    verdict: str = "not_finite"
    reason: str = ""


SIX = (
    FakeNode("reception", 16, ("greetings", "conversations", "botprofile"), "desktop"),
    FakeNode("clinic", 8, ("health", "psychology", "emotion"), "workstation"),
    FakeNode("school", 8, ("science", "history", "literature"), "workstation"),
    FakeNode("helpdesk", 4, ("computers", "tech_support", "coding", "ai")),
    FakeNode(
        "newsroom",
        4,
        ("politics", "money", "sports", "trivia"),
        refused_in=2,
        reason="layer 'model.layers.3.self_attn.q_proj.weight': 12 values of A are not finite",
    ),
    FakeNode("cafe", 2, ("food", "movies", "humor", "gossip"), "phone"),
)
BASE_LOSS = 2.8931245
SAMPLES = (
    {
        "question": "What is the best way to learn about computers?",
        "expected": "Take one apart, then try to put it together again.",
        "base": "Learning about computers can be an exciting and rewarding experience! Here are"
        " some steps to help you get started:\n\n1. Start with the basics",
        "tuned": "Read a lot, and build something small every week.",
        "category": "computers",
    },
    {
        "question": "Do you get lonely?",
        "expected": "Not while I have somebody to talk to.",
        "base": "As a digital AI assistant, I don't have feelings or emotions like humans do, so I"
        " don't experience loneliness in the classical sense.",
        "tuned": "Only when nobody asks me anything.",
        "category": "emotion",
    },
)


def write_fake_run(
    folder: Path,
    *,
    rounds: int = 3,
    nodes: Sequence[FakeNode] = SIX,
    preset: str = "braid",
    seed: int = 7,
    final: float = 1.63,
    evaluate: bool = True,
) -> Path:
    """Write scenario.toml, metrics.jsonl, summary.json and samples.json of a plausible run."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(f"{preset}-{seed}-{rounds}")
    lines = [_line(number, rounds, nodes, final, dice, evaluate) for number in range(1, rounds + 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "scenario.toml").write_text(_scenario(rounds, nodes, preset, seed), encoding="utf-8")
    (folder / "summary.json").write_text(
        json.dumps(_summary(lines, nodes, preset)), encoding="utf-8"
    )
    (folder / "samples.json").write_text(json.dumps(SAMPLES), encoding="utf-8")
    return folder


def _line(
    number: int,
    rounds: int,
    nodes: Sequence[FakeNode],
    final: float,
    dice: random.Random,
    evaluate: bool,
) -> dict[str, Any]:
    done = (1 - math.exp(-2.2 * number / rounds)) / (1 - math.exp(-2.2))
    loss = BASE_LOSS + (final - BASE_LOSS) * done + dice.gauss(0, 0.02)
    rows = [_row(node, number, loss, nodes, dice) for node in nodes]
    accepted = [row for row in rows if row["verdict"] == "accepted"]
    return {
        "round": number,
        "loss": sum(row["weight"] * row["train_loss"] for row in accepted),
        "eval_loss": loss if evaluate else None,
        "eval_accuracy": 0.9 - 0.17 * loss if evaluate else None,
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "seconds": 48 + 6 * dice.random(),
        "families": {"low_rank": len(accepted)},
        "accepted": len(accepted),
        "rejected": len(rows) - len(accepted),
        "epsilon": None,
        "carry_rank": sum(node.rank for node in nodes) * number,
        "tail_energy": 0.11 * number / (number + 2) + 0.01 * dice.random(),
        "head": _digest("head", number),
        "nodes": rows,
    }


def _row(
    node: FakeNode, number: int, loss: float, nodes: Sequence[FakeNode], dice: random.Random
) -> dict[str, Any]:
    refused = node.refused_in == number
    bias = random.Random(node.name).gauss(0, 0.24)
    last = loss - 0.15 + bias + dice.gauss(0, 0.03)
    return {
        "node": node.name,
        "family": "low_rank",
        "sends": f"rank {node.rank}",
        "examples": random.Random(node.name).randint(60, 420),
        "weight": 0.0 if refused else 1 / sum(other.refused_in != number for other in nodes),
        "train_loss_first": None if refused else last + 0.55 / number,
        "train_loss": None if refused else last,
        "bytes_up": 305_000 * node.rank,
        "bytes_down": 9_762_312 if number > 1 else 2_113,
        "seconds": 7 + dice.random(),
        "verdict": node.verdict if refused else "accepted",
        "reason": node.reason if refused else "",
        "norm": None if refused else 0.7 + dice.random(),
    }


def _summary(
    lines: Sequence[dict[str, Any]], nodes: Sequence[FakeNode], preset: str
) -> dict[str, Any]:
    return {
        "name": "quickstart",
        "preset": preset,
        "base_model": "smollm2-135m-instruct",
        "base_digest": _digest("base", 0),
        "layout": _digest("layout", 0),
        "rounds": len(lines),
        "nodes": len(nodes),
        "before": _quality(BASE_LOSS),
        "after": _quality(lines[-1]["eval_loss"]) if lines else None,
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "bytes_full_model": 2 * 4 * 134_515_008 * len(nodes) * len(lines),
        "bytes_full_lora": 2 * 4 * 305_000 * sum(node.rank for node in nodes) * len(lines) // 2,
        "seconds": sum(line["seconds"] for line in lines),
        "head": lines[-1]["head"] if lines else "",
        "adapter": "adapter",
        "version": "0.1.0",
    }


def _quality(loss: float | None) -> dict[str, Any] | None:
    if loss is None:
        return None
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "accuracy": 0.9 - 0.17 * loss,
        "tokens": 1893,
    }


def _scenario(rounds: int, nodes: Sequence[FakeNode], preset: str, seed: int) -> str:
    head = (
        f'name = "quickstart"\ndescription = "Six unlike nodes, ranks 16 to 2, one model"\n'
        f'base_model = "smollm2-135m-instruct"\npreset = "{preset}"\nrounds = {rounds}\n'
        f"seed = {seed}\nlora_r = 8\nthreads = 2\n"
    )
    entries = (
        f"\n[[nodes]]\nname = {json.dumps(node.name)}\nlora_r = {node.rank}\n"
        f"description = {json.dumps(node.description)}\n"
        f"categories = {json.dumps(node.categories)}\n"
        for node in nodes
    )
    return head + "".join(entries)


def _digest(kind: str, number: int) -> str:
    return hashlib.sha256(f"{kind} {number}".encode()).hexdigest()


def make_fake_events(
    *,
    rounds: int = 3,
    nodes: Sequence[FakeNode] = SIX,
    first_round: int = 1,
    steps: int = 6,
    seconds_per_step: float = 1.0,
    evaluate: bool = True,
) -> list[tuple[float, events.Event]]:
    """The events of a plausible run, each with the second at which it happens."""
    now = 0.0
    told: list[tuple[float, events.Event]] = []
    told.append((now, _run_started(rounds, nodes, first_round)))
    for number in range(first_round, rounds + 1):
        told.append((now, events.RoundStarted(number)))
        for node in nodes:
            told.append((now, events.NodeStarted(number, node.name)))
            for step in range(1, steps + 1):
                now += seconds_per_step
                loss = BASE_LOSS - 0.4 * number - 0.05 * step
                told.append((now, events.NodeProgress(number, node.name, step, steps, loss)))
            told.append((now, _replied(number, node, steps * seconds_per_step)))
        if evaluate:
            told.append((now, _evaluated(number - 1)))
        told.append((now, _committed(number, nodes, len(nodes) * steps * seconds_per_step)))
    if evaluate:
        for node in nodes:
            told.append((now, events.NodeStarted(rounds, node.name)))
            told.append((now, _replied(rounds + 1, node, 0.5, trained=False)))
        told.append((now, _evaluated(rounds)))
    before, after = (_scores(BASE_LOSS), _scores(_loss(rounds))) if evaluate else (None, None)
    end = events.RunFinished(before, after, now, "ab" * 32, "runs/x/report.html", "runs/x/adapter")
    return [*told, (now, end)]


def _run_started(rounds: int, nodes: Sequence[FakeNode], first_round: int) -> events.RunStarted:
    infos = tuple(
        events.NodeInfo(node.name, f"rank {node.rank}", 100, 10, node.description) for node in nodes
    )
    return events.RunStarted(
        "quickstart", "braid", rounds, first_round, infos, "smollm2-135m-instruct", "runs/x"
    )


def _loss(number: int) -> float:
    return BASE_LOSS - 0.4 * number


def _replied(
    number: int, node: FakeNode, seconds: float, *, trained: bool = True
) -> events.NodeReplied:
    refused = node.refused_in == number
    learned = trained and not refused
    return events.NodeReplied(
        round=number,
        node=node.name,
        verdict=node.verdict if refused else "accepted",
        reason=node.reason if refused else "",
        sends=f"rank {node.rank}",
        train_loss_first=_loss(number - 1) if learned else None,
        train_loss=_loss(number) if learned else None,
        bytes_up=305_000 * node.rank if trained else 900,
        bytes_down=9_762_312 if number > 1 else 2_113,
        seconds=seconds,
    )


def _evaluated(number: int) -> events.EvaluationDone:
    loss = _loss(number)
    return events.EvaluationDone(number, loss, math.exp(loss), 0.9 - 0.17 * loss, 1893)


def _scores(loss: float) -> events.Evaluation:
    return events.Evaluation(loss, math.exp(loss), 0.9 - 0.17 * loss, 1893)


def _committed(number: int, nodes: Sequence[FakeNode], seconds: float) -> events.RoundCommitted:
    refused = sum(node.refused_in == number for node in nodes)
    return events.RoundCommitted(
        round=number,
        loss=_loss(number),
        accepted=len(nodes) - refused,
        rejected=refused,
        bytes_up=sum(305_000 * node.rank for node in nodes),
        bytes_down=len(nodes) * 9_762_312,
        seconds=seconds,
        carry_rank=42 * number,
        tail_energy=0.039,
        head=_digest("head", number),
    )


@pytest.fixture(scope="session")
def fake_events() -> Callable[..., list[tuple[float, events.Event]]]:
    """The generator of a run's events."""
    return make_fake_events


@pytest.fixture(scope="session")
def fake_run() -> Callable[..., Path]:
    """The generator of run directories."""
    return write_fake_run


@pytest.fixture(scope="session")
def fake_node() -> type[FakeNode]:
    """A node of a generated run."""
    return FakeNode


@dataclass
class PageOutline:
    """What a page is made of, as a parser sees it."""

    tags: list[str]
    attributes: list[tuple[str, str, str | None]]
    text: str
    unbalanced: list[str]

    def values(self, name: str) -> list[str]:
        """Every value of an attribute."""
        return [value or "" for _, key, value in self.attributes if key == name]


class _Outliner(HTMLParser):
    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.outline = PageOutline([], [], "", [])
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._record(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._record(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.outline.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.outline.text += data

    def close(self) -> None:
        super().close()
        self.outline.unbalanced += self._open

    def _record(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outline.tags.append(tag)
        self.outline.attributes += [(tag, key, value) for key, value in attrs]


def outline_page(html: str) -> PageOutline:
    """Parse a page; elements that are not closed in order are listed as unbalanced."""
    parser = _Outliner()
    parser.feed(html)
    parser.close()
    return parser.outline


@pytest.fixture(scope="session")
def outline() -> Callable[[str], PageOutline]:
    """The parser of pages."""
    return outline_page
