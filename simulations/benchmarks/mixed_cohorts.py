"""What weak nodes add: one fleet as a mixed cohort, and every part of it alone.

    python -m simulations.benchmarks.mixed_cohorts

Six nodes: two have the memory for LoRA by backpropagation, two can train all weights but send a sketch,
two run forward passes alone. With unlike data each holds topics that nobody else has; with like data all
hold the same mixture. All runs go through `fedbraid simulate`'s own code; the model is a small Llama,
first trained from scratch on other topics, so that a comparison takes minutes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedserver.configuration import RunConfiguration, parse
from fedserver.intervals import Estimate, estimate
from fedserver.ledger import Ledger
from simulations.benchmarks.adaptive_basis import TOPICS, Case, pretrained, tokenizer
from simulations.run import simulate

STRONG, WEAK = ("lora-1", "lora-2"), ("sketch-1", "sketch-2", "forward-1", "forward-2")
COHORTS: dict[str, dict[str, Any]] = {
    "mixed, families add": {},
    "mixed, one mean over all": {"mixing": {"rule": "mean"}},
    "strong nodes alone": {"resting": WEAK},
    "weak nodes alone": {"resting": STRONG},
}


@dataclass(frozen=True)
class Outcome:
    """Losses in nats per answer token at the end: over all nodes' data, and over the strong nodes'."""

    everyone: float
    strong: float
    before: float


def scenario(base: Path, cohort: str, *, unlike: bool, seed: int, rounds: int) -> RunConfiguration:
    """The fleet as a scenario; nodes that rest in a cohort still evaluate."""
    changes = dict(COHORTS[cohort])
    resting = changes.pop("resting", ())
    nodes: list[dict[str, Any]] = []
    for name, topic in zip((*STRONG, *WEAK), TOPICS, strict=True):
        node: dict[str, Any] = {"name": name, "trains": name not in resting}
        if unlike:
            node["categories"] = [topic]
        if name.startswith("sketch"):
            node["strand"] = "projected"
        if name.startswith("forward"):
            node["strand"] = "zeroth-order"
        nodes.append(node)
    data: dict[str, Any] = {"source": "chatterbot", "held_out": 0.2, "held_out_max": 64}
    data |= {"partition": "categories"} if unlike else {"partition": "iid"}
    return parse(
        {
            "base_model": str(base),
            "preset": "mixed",
            "rounds": rounds,
            "seed": seed,
            "threads": 2,
            "max_length": 64,
            "micro_batch_size": 8,
            "local_steps": 20,
            "lora_r": 8,
            "learning_rate": 5e-3,
            "zeroth_order": {"learning_rate": 2e-4, "local_steps": 100, "clip": 10.0},
            "projected": {"learning_rate": 1e-3, "target_modules": ["all-linear"]},
            "data": data,
            "nodes": nodes,
            **changes,
        }
    )


def run(configuration: RunConfiguration, folder: Path) -> Outcome:
    """Simulate, and read the final evaluation by node."""
    summary = simulate(configuration, folder, lambda event: None, samples=0)
    ledger = Ledger(folder)
    last = ledger.last("evaluation")
    assert last is not None
    losses = {}
    for node in last.content["nodes"]:
        found = node["report"]["evaluation"]
        losses[node["node"]] = (found["loss_sum"], found["tokens"])
    ledger.close()
    strong = [losses[name] for name in STRONG]
    return Outcome(
        everyone=summary["after"]["loss"],
        strong=sum(loss for loss, _ in strong) / sum(tokens for _, tokens in strong),
        before=summary["before"]["loss"],
    )


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    rounds: Annotated[int, typer.Option(min=1)] = 6,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Run every cohort with unlike and with like data."""
    case = Case()
    found: dict[tuple[bool, str], list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as place, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("cohorts", total=2 * seeds * len(COHORTS))
        for seed in range(seeds):
            base = Path(place) / f"base-{seed}"
            words = tokenizer()
            model: Any = pretrained(case, words, seed)
            model.save_pretrained(base)
            words.save_pretrained(base)
            for unlike in (True, False):
                for cohort in COHORTS:
                    asked = scenario(base, cohort, unlike=unlike, seed=seed, rounds=rounds)
                    folder = Path(place) / f"{seed}-{unlike}-{list(COHORTS).index(cohort)}"
                    found.setdefault((unlike, cohort), []).append(run(asked, folder))
                    progress.advance(task)
    if as_json:
        rows = [
            {"unlike": unlike, "cohort": cohort, "outcomes": [vars(o) for o in outcomes]}
            for (unlike, cohort), outcomes in found.items()
        ]
        print(json.dumps(rows))
        return
    for unlike in (True, False):
        Console().print(_table({c: o for (u, c), o in found.items() if u == unlike}, unlike))


def _table(found: dict[str, list[Outcome]], unlike: bool) -> Table:
    kind = "unlike" if unlike else "like"
    before = _text([o.before for o in next(iter(found.values()))])
    table = Table(title=f"{kind} data; before: {before}; mean and 95 % interval over seeds")
    for heading in ("cohort", "loss, all nodes' data", "loss, the strong nodes' data"):
        table.add_column(heading)
    for cohort, outcomes in found.items():
        table.add_row(
            cohort, _text([o.everyone for o in outcomes]), _text([o.strong for o in outcomes])
        )
    return table


def _text(values: Sequence[float]) -> str:
    found: Estimate | None = estimate(list(values))
    if found is None:
        return ""
    width = "" if found.half_width is None else f" ± {found.half_width:.3f}"
    return f"{found.mean:.3f}{width}"


if __name__ == "__main__":
    typer.run(main)
