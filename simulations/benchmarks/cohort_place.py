"""Where runs of the fleet find their data and models, and where what they showed is kept.

A folder that is used again skips what it holds: models by seed, runs by the scenario's own id.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aggregators import Layout
from fedclient import base_model
from fedclient.records import EMBEDDED, Example, read_examples
from fedserver.configuration import RunConfiguration
from fedserver.ledger import Entry, Ledger
from simulations.benchmarks.small_language import manual, tokenizer, write_model
from simulations.run import simulate

# Of the embedded conversations one topic a node; the model has read the others, but for the one that
# repeats ten questions a hundred times.
TOPICS = ("trivia", "emotion", "conversations", "coding", "ai", "psychology")
LEFT_OUT = ("tech_support",)
ROWS = 300  # a node, of a file
HIDDEN, LAYERS = 96, 3
Losses = Mapping[str, tuple[float, int]]


@dataclass(frozen=True)
class Run:
    """What one run showed: by node the summed loss and the tokens, before and after.

    ``lambdas``: of each round, by family. ``seconds``: of the processor.
    """

    before: Losses
    after: Losses
    lambdas: Sequence[Mapping[str, float]]
    seconds: float


@dataclass(frozen=True)
class Place:
    """All nodes' data in one file, a model a seed, and the runs so far as JSON lines.

    ``data``: rows with the node that holds them where data are unlike.
    """

    folder: Path
    data: Path
    words: Any
    read: Sequence[Example]
    runs: dict[str, Run]

    @classmethod
    def make(cls, folder: Path, nodes: Sequence[str], files: Mapping[str, str]) -> Place:
        """Write the nodes' data: topics of the embedded conversations, or rows of files by node."""
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        parts = _dealt(files) if files else _topics(nodes)
        rows = "".join(
            json.dumps(
                {"messages": [{"role": r, "content": c} for r, c in e.messages], "node": node}
            )
            + "\n"
            for node, examples in parts.items()
            for e in examples
        )
        # Models and runs are of these data: others in the same folder have other names.
        data = folder / f"data-{hashlib.sha256(rows.encode()).hexdigest()[:8]}.jsonl"
        data.write_text(rows, encoding="utf-8")
        held = [example for examples in parts.values() for example in examples]
        kept = set(held)
        talks = [e for e in dict.fromkeys(read_examples(EMBEDDED)) if e.category not in LEFT_OUT]
        read = [*(e for e in talks if e not in kept), *manual()]
        words = tokenizer([*held, *read[: 2 * len(held)]])
        return cls(folder, data, words, read, _known(folder / "runs.jsonl"))

    def model(self, seed: int) -> Path:
        """The folder of a seed's model, trained where it is not there yet."""
        found = self.folder / f"model-{self.data.stem}-{seed}"
        if not found.exists():
            with TemporaryDirectory(dir=self.folder) as half:
                whole = Path(half) / "model"
                write_model(whole, self.words, self.read, seed, hidden=HIDDEN, layers=LAYERS)
                whole.rename(found)
        return found

    def layout(self, seed: int) -> Layout:
        """Names and shapes of a seed's model."""
        return base_model.load(str(self.model(seed))).layout

    def run(self, asked: RunConfiguration, about: str) -> Run:
        """Simulate, or look up; ``about`` stands beside the result for those who read the file."""
        identity = f"{asked.run_id()}-{asked.rounds}"
        if identity not in self.runs:
            found = self.runs[identity] = _simulated(asked)
            with (self.folder / "runs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": identity, "about": about} | asdict(found)) + "\n")
        return self.runs[identity]


def _simulated(asked: RunConfiguration) -> Run:
    started = time.process_time()
    with TemporaryDirectory() as folder:
        simulate(asked, Path(folder) / "run", lambda event: None, samples=0)
        ledger = Ledger(Path(folder) / "run")
        rounds, last = list(ledger.entries("round")), ledger.last("evaluation")
        ledger.close()
    assert last is not None
    return Run(
        before=_losses(rounds[0]),
        after=_losses(last),
        lambdas=[entry.content["mixing"].get("weights", {}) for entry in rounds],
        seconds=time.process_time() - started,
    )


def _losses(entry: Entry) -> Losses:
    found = {node["node"]: node["report"]["evaluation"] for node in entry.content["nodes"]}
    return {node: (one["loss_sum"], one["tokens"]) for node, one in found.items()}


def _known(file: Path) -> dict[str, Run]:
    """Runs of a file; a last line that was cut off is taken out of it."""
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        file.write_text("".join(whole), encoding="utf-8")
    found = {}
    for line in whole:
        row = json.loads(line)
        before, after = (
            {node: (total, tokens) for node, (total, tokens) in row[key].items()}
            for key in ("before", "after")
        )
        found[row["run"]] = Run(before, after, row["lambdas"], row["seconds"])
    return found


def _topics(nodes: Sequence[str]) -> dict[str, list[Example]]:
    unique = list(dict.fromkeys(read_examples(EMBEDDED)))
    return {
        node: [example for example in unique if example.category == topic]
        for node, topic in zip(nodes, TOPICS, strict=True)
    }


def _dealt(files: Mapping[str, str]) -> dict[str, list[Example]]:
    """The first rows of each file, dealt to its nodes in turn."""
    parts: dict[str, list[Example]] = {}
    for source in dict.fromkeys(files.values()):
        nodes = [node for node, file in files.items() if file == source]
        rows = read_examples(source)[: ROWS * len(nodes)]
        parts |= {node: rows[place :: len(nodes)] for place, node in enumerate(nodes)}
    return parts
