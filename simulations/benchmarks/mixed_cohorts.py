"""What weak nodes add: one fleet as a mixed cohort, under every rule of mixing, and each part alone.

    python -m simulations.benchmarks.mixed_cohorts --seeds 3

Six nodes: two have the memory for LoRA by backpropagation, two can train all weights but send a sketch,
two run forward passes alone. With unlike data each holds what nobody else has; with like data all hold
the same mixture. Every run goes through `fedbraid simulate`'s own code, with a small Llama that takes
minutes. Rates are tuned before any mixing, with unlike data and a seed that is not reported: of three a
family, the smallest with which its nodes alone lower their own loss by nine tenths of the most. Larger
ones gain a node little and cost the others, whose data its steps do not know.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedclient.records import EMBEDDED, Example, read_examples
from fedserver.configuration import RunConfiguration, parse
from fedserver.intervals import estimate
from fedserver.ledger import Entry, Ledger
from simulations.benchmarks.small_language import MAX_LENGTH, manual, tokenizer, write_model
from simulations.run import simulate

TUNING_SEED = 0
STRONG, WEAK = ("lora-1", "lora-2"), ("sketch-1", "sketch-2", "forward-1", "forward-2")
NODES = (*STRONG, *WEAK)
# Of the embedded conversations one topic a node; the model has read the others, but for the one that
# repeats ten questions a hundred times.
TOPICS = ("trivia", "emotion", "conversations", "coding", "ai", "psychology")
ROWS = 300  # a node, of a file
FAMILIES = {"lora": STRONG, "projected": WEAK[:2], "zeroth-order": WEAK[2:]}
RATES = {
    "lora": (1e-3, 3e-3, 1e-2),
    "projected": (2.5e-4, 5e-4, 1e-3),
    "zeroth-order": (5e-5, 1e-4, 2e-4),
}
ENOUGH = 0.9  # of the largest gain
LOCAL_STEPS, ZEROTH_ORDER_STEPS = 8, 40
# Nodes that train, and the rule of mixing.
COHORTS = {
    "mixed, overlap counted once": (NODES, "overlap"),
    "mixed, families add": (NODES, "add"),
    "mixed, one mean over all": (NODES, "mean"),
    "strong nodes alone": (STRONG, "add"),
    "weak nodes alone": (WEAK, "add"),
}
ALONE = "strong nodes alone"
LEFT_OUT = ("tech_support",)
Rates = Mapping[str, float]
Losses = Mapping[str, tuple[float, int]]
Listener = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where runs find what they need: all nodes' data in one file, and a model a seed."""

    folder: Path
    words: Any
    read: Sequence[Example]

    @classmethod
    def make(cls, folder: Path, strong: str | None, weak: str | None) -> Place:
        """Write the nodes' data: topics of the embedded conversations, or rows of two files."""
        parts = _topics() if strong is None or weak is None else _dealt(strong, weak)
        with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
            for node, examples in parts.items():
                for example in examples:
                    talk = [{"role": role, "content": text} for role, text in example.messages]
                    file.write(json.dumps({"messages": talk, "node": node}) + "\n")
        held = [example for examples in parts.values() for example in examples]
        kept = set(held)
        talks = [e for e in dict.fromkeys(read_examples(EMBEDDED)) if e.category not in LEFT_OUT]
        read = [*(e for e in talks if e not in kept), *manual()]
        return cls(folder, tokenizer([*held, *read[: 2 * len(held)]]), read)

    def model(self, seed: int) -> Path:
        """The folder of a seed's model, trained where it is not there yet."""
        found = self.folder / f"model-{seed}"
        if not found.exists():
            write_model(found, self.words, self.read, seed)
        return found

    @property
    def data(self) -> Path:
        """Rows with the node that holds them where data are unlike."""
        return self.folder / "data.jsonl"


@dataclass(frozen=True)
class Outcome:
    """Losses in nats per answer token: over all nodes' held-out data, and over some nodes'."""

    seed: int
    unlike: bool
    cohort: str
    before: float
    everyone: float
    strong: float


def scenario(
    place: Place, seed: int, rates: Rates, trains: Sequence[str], rule: str, *,
    unlike: bool, rounds: int,
) -> RunConfiguration:  # fmt: skip
    """The fleet as a scenario; nodes that do not train still evaluate."""
    nodes = [
        {"name": name, "strand": strand, "trains": name in trains}
        | ({"categories": [name]} if unlike else {})
        for strand, names in FAMILIES.items()
        for name in names
    ]
    return parse(
        {
            "base_model": str(place.model(seed)),
            "preset": "mixed",
            "rounds": rounds,
            "seed": seed,
            "threads": 1,
            "max_length": MAX_LENGTH,
            "micro_batch_size": 8,
            "local_steps": LOCAL_STEPS,
            "lora_r": 8,
            "learning_rate": rates["lora"],
            "zeroth_order": {
                "learning_rate": rates["zeroth-order"],
                "local_steps": ZEROTH_ORDER_STEPS,
                "clip": 10.0,
            },
            "projected": {
                "learning_rate": rates["projected"],
                "target_modules": ["all-linear"],
            },
            "mixing": {"rule": rule},
            "data": {
                "source": str(place.data),
                "key": "node",
                "held_out": 0.2,
                "partition": "categories" if unlike else "iid",
            },
            "nodes": nodes,
        }
    )


def run(configuration: RunConfiguration) -> tuple[Losses, Losses]:
    """Simulate; the summed loss and the tokens by node, before and after."""
    with tempfile.TemporaryDirectory() as folder:
        simulate(configuration, Path(folder) / "run", lambda event: None, samples=0)
        ledger = Ledger(Path(folder) / "run")
        first, last = next(iter(ledger.entries("round"))), ledger.last("evaluation")
        ledger.close()
    assert last is not None
    return _losses(first), _losses(last)


def _losses(entry: Entry) -> Losses:
    found = {node["node"]: node["report"]["evaluation"] for node in entry.content["nodes"]}
    return {node: (one["loss_sum"], one["tokens"]) for node, one in found.items()}


def loss_of(losses: Losses, nodes: Sequence[str]) -> float:
    """Mean over the tokens of some nodes."""
    return sum(losses[n][0] for n in nodes) / sum(losses[n][1] for n in nodes)


def tuned(place: Place, rounds: int, done: Listener) -> dict[str, float]:
    """Each family's gentlest good rate for its own data, alone."""
    best = {family: rates[0] for family, rates in RATES.items()}
    for family, rates in RATES.items():
        gains = {}
        for rate in rates:
            asked = scenario(
                place, TUNING_SEED, best | {family: rate}, FAMILIES[family], "add",
                unlike=True, rounds=rounds,
            )  # fmt: skip
            before, after = (loss_of(losses, FAMILIES[family]) for losses in run(asked))
            gains[rate] = before - after
            done(f"{family} alone at {rate:g}: {before:.3f} to {after:.3f} on its own data")
        most = max(gains.values())
        best[family] = min(rate for rate, gain in gains.items() if gain >= ENOUGH * most)
    return best


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    rounds: Annotated[int, typer.Option(min=1)] = 8,
    strong: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSON lines of the strong nodes; with --weak")
    ] = None,
    weak: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSON lines of the weak nodes")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Tune each family alone, then run every cohort with unlike and with like data."""
    if (strong is None) != (weak is None):
        raise typer.BadParameter("--strong and --weak come together")
    outcomes: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress,
    ):
        place = Place.make(Path(folder), strong, weak)
        total = sum(map(len, RATES.values())) + 2 * seeds * len(COHORTS)
        told = functools.partial(_told, progress, progress.add_task("runs", total=total))
        rates = tuned(place, rounds, told)
        for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + seeds):
            for unlike in (True, False):
                for cohort, (trains, rule) in COHORTS.items():
                    asked = scenario(place, seed, rates, trains, rule, unlike=unlike, rounds=rounds)
                    first, last = run(asked)
                    everyone, own = loss_of(last, NODES), loss_of(last, STRONG)
                    before = loss_of(first, NODES)
                    outcomes.append(Outcome(seed, unlike, cohort, before, everyone, own))
                    if as_json:
                        print(json.dumps(asdict(outcomes[-1])), flush=True)
                    told(f"seed {seed}, {_kind(unlike)}, {cohort}: {outcomes[-1].everyone:.3f}")
    if as_json:
        return
    console = Console()
    console.width = console.width if console.is_terminal else 150
    console.print("rates: " + ", ".join(f"{family} {rate:g}" for family, rate in rates.items()))
    for unlike in (True, False):
        console.print(table([o for o in outcomes if o.unlike == unlike]))


def table(outcomes: Sequence[Outcome]) -> Table:
    """A cohort a row; differences are of the same seed, hence of the same model and data."""
    before = interval([o.before for o in outcomes if o.cohort == ALONE])
    seeds = len({o.seed for o in outcomes})
    found = Table(
        title=f"{_kind(outcomes[0].unlike)} data, {seeds} seeds; before: {before}",
        caption="nats per answer token, mean and 95 % interval over seeds; differences seed by seed",
    )
    first = next(iter(COHORTS))
    for heading in (
        "cohort", "all nodes' data", f"less that of '{first}'", "strong nodes' data",
        "over the strong alone, %",
    ):  # fmt: skip
        found.add_column(heading)
    by = {
        cohort: sorted((o for o in outcomes if o.cohort == cohort), key=lambda o: o.seed)
        for cohort in COHORTS
    }
    for cohort, mine in by.items():
        more = [o.everyone - f.everyone for o, f in zip(mine, by[first], strict=True)]
        over = [100 * (o.strong / a.strong - 1) for o, a in zip(mine, by[ALONE], strict=True)]
        found.add_row(
            cohort,
            interval([o.everyone for o in mine]),
            "" if cohort == first else interval(more, "+"),
            interval([o.strong for o in mine]),
            "" if cohort == ALONE else interval(over, "+", digits=1),
        )
    return found


def interval(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Mean and half-width of Student's interval; the mean alone of one value."""
    found = estimate(values)
    assert found is not None
    width = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:{sign}.{digits}f}{width}"


def _topics() -> dict[str, list[Example]]:
    unique = list(dict.fromkeys(read_examples(EMBEDDED)))
    return {
        node: [example for example in unique if example.category == topic]
        for node, topic in zip(NODES, TOPICS, strict=True)
    }


def _dealt(strong: str, weak: str) -> dict[str, list[Example]]:
    """The first rows of each file, dealt to its nodes in turn."""
    parts: dict[str, list[Example]] = {}
    for nodes, source in ((STRONG, strong), (WEAK, weak)):
        rows = read_examples(source)[: ROWS * len(nodes)]
        parts |= {node: rows[place :: len(nodes)] for place, node in enumerate(nodes)}
    return parts


def _told(progress: Progress, task: Any, text: str) -> None:
    progress.console.print(text, highlight=False)
    progress.advance(task)


def _kind(unlike: bool) -> str:
    return "unlike" if unlike else "like"


if __name__ == "__main__":
    typer.run(main)
