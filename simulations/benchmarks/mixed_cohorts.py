"""What weak nodes add: one fleet as a mixed cohort, under every rule of mixing, and each part alone.

    python -m simulations.benchmarks.mixed_cohorts --seeds 3 --output DIR

Six devices with limits of memory and upload; what each can be asked for follows from these alone
(``strand = "auto"``), and is printed with its reason. With unlike data each device holds what nobody
else has; with like data all hold the same mixture. Every run goes through `fedbraid simulate`'s own
code, with a small Llama that takes seconds. Rates are tuned before any mixing, with unlike data and a
seed that is not reported: of three a family, the smallest with which its nodes alone lower their own
loss by nine tenths of the most. Larger ones gain a node little and cost the others, whose data its
steps do not know.

What a run showed is a line of DIR/runs.jsonl; the same command goes on where it was stopped.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from fedserver.configuration import RunConfiguration, parse
from fedserver.device_choice import with_choices
from simulations.benchmarks.cohort_place import Place, Run
from simulations.benchmarks.cohort_tables import COHORTS, Outcome, advantages, loss_of, losses
from simulations.benchmarks.small_language import MAX_LENGTH
from simulations.benchmarks.tables import table_console

TUNING_SEED = 0
# Two devices a kind: what has both, what has memory behind a thin link, and what has no memory.
DEVICES: Mapping[str, Mapping[str, float]] = {
    "workstation": {"memory_limit_mb": 32, "upload_limit_kb": 1000},
    "laptop": {"memory_limit_mb": 32, "upload_limit_kb": 18},
    "phone": {"memory_limit_mb": 14, "upload_limit_kb": 1000},
}
NODES = {f"{kind}-{place}": limits for kind, limits in DEVICES.items() for place in (1, 2)}
RATES = {
    "lora": (1e-3, 3e-3, 1e-2),
    "projected": (2.5e-3, 5e-3, 1e-2),
    "zeroth-order": (1e-4, 2e-4, 4e-4),
}
ENOUGH = 0.9  # of the largest gain
LOCAL_STEPS, ZEROTH_ORDER_STEPS = 8, 40
Rates = Mapping[str, float]
Families = Mapping[str, Sequence[str]]


@dataclass
class Told:
    """Lines for whoever waits: what was found, how many runs are left, and about how long they take."""

    total: int
    done: int = 0
    made: int = 0
    started: float = field(default_factory=time.monotonic)

    def run(self, place: Place, asked: RunConfiguration, about: str) -> Run:
        """The run, made or looked up."""
        known = len(place.runs)
        found = place.run(asked, about)
        self.done += 1
        self.made += len(place.runs) - known
        each = (time.monotonic() - self.started) / max(self.made, 1)
        before, after = (loss_of(one, one) for one in (found.before, found.after))
        print(
            f"[{self.done}/{self.total}, about {each * (self.total - self.done) / 60:.0f} min left]"
            f" {about}: {before:.3f} to {after:.3f} on all data, {found.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return found


def scenario(
    place: Place, seed: int, rates: Rates, trains: Sequence[str], rule: str, *,
    unlike: bool, rounds: int,
) -> RunConfiguration:  # fmt: skip
    """The fleet as a scenario; nodes that do not train still evaluate, all on the whole base."""
    nodes: list[dict[str, Any]] = [
        {"name": name, "strand": "auto", "base_format": "full", "trains": name in trains, **limits}
        | ({"categories": [name]} if unlike else {})
        for name, limits in NODES.items()
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
                # A sketch in the adaptive basis is never smaller than LoRA of rank 1.
                "basis": "random",
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


def families(place: Place, rounds: int) -> tuple[Families, Mapping[str, str]]:
    """The nodes of each strand as their limits decide, and why, by node."""
    rates = {family: some[0] for family, some in RATES.items()}
    asked = scenario(place, TUNING_SEED, rates, tuple(NODES), "add", unlike=True, rounds=rounds)
    chosen, reasons = with_choices(asked, place.layout(TUNING_SEED))
    found: dict[str, list[str]] = {family: [] for family in RATES}
    for node in chosen.nodes:
        found[chosen.strand(node.name)].append(node.name)
    return found, reasons


def tuned(place: Place, fleet: Families, rounds: int, told: Told) -> dict[str, float]:
    """Each family's gentlest good rate for its own data, alone."""
    best = {family: rates[0] for family, rates in RATES.items()}
    for family, nodes in fleet.items():
        gains = {}
        for rate in RATES[family]:
            asked = scenario(
                place, TUNING_SEED, best | {family: rate}, nodes, "add", unlike=True, rounds=rounds
            )
            found = told.run(place, asked, f"tuning, {family} alone at {rate:g}")
            gains[rate] = loss_of(found.before, nodes) - loss_of(found.after, nodes)
        most = max(gains.values())
        best[family] = min(rate for rate, gain in gains.items() if gain >= ENOUGH * most)
        words = ", ".join(f"{gain:.3f} at {rate:g}" for rate, gain in gains.items())
        print(f"{family} alone lowers its own loss by {words}: {best[family]:g}", flush=True)
    return best


def outcome(found: Run, seed: int, cohort: str, strong: Sequence[str], *, unlike: bool) -> Outcome:
    """Losses of a run over all nodes' held-out data, and over the strong nodes'."""
    return Outcome(
        seed=seed,
        unlike=unlike,
        cohort=cohort,
        before=loss_of(found.before, NODES),
        everyone=loss_of(found.after, NODES),
        strong=loss_of(found.after, strong),
    )


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    rounds: Annotated[int, typer.Option(min=1)] = 6,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep models and runs, and use those there.")
    ] = None,
    strong: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSON lines of workstations; with --weak")
    ] = None,
    weak: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSON lines of laptops and phones")
    ] = None,
) -> None:
    """Tune each family alone, then run every cohort with unlike and with like data."""
    if (strong is None) != (weak is None):
        raise typer.BadParameter("--strong and --weak come together")
    files = {}
    if strong is not None and weak is not None:
        files = {name: strong if name.startswith("workstation") else weak for name in NODES}
    with TemporaryDirectory() as scratch:
        _compare(Place.make(output or Path(scratch), tuple(NODES), files), seeds, rounds)


def _compare(place: Place, seeds: int, rounds: int) -> None:
    told = Told(total=sum(map(len, RATES.values())) + 2 * seeds * len(COHORTS))
    fleet, reasons = families(place, rounds)
    for node, reason in reasons.items():
        print(f"{node}: {reason}", flush=True)
    rates = tuned(place, fleet, rounds, told)
    strong = fleet["lora"]
    groups = {
        "all": list(NODES),
        "strong": strong,
        "weak": [name for name in NODES if name not in strong],
    }
    console = table_console()
    console.width = console.width if console.is_terminal else 150
    for unlike in (True, False):
        kind = "unlike" if unlike else "like"
        outcomes: list[Outcome] = []
        overlaps: list[Mapping[str, float]] = []
        for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + seeds):
            for cohort, (group, rule) in COHORTS.items():
                asked = scenario(
                    place, seed, rates, groups[group], rule, unlike=unlike, rounds=rounds
                )
                found = told.run(place, asked, f"seed {seed}, {kind} data, {cohort}")
                outcomes.append(outcome(found, seed, cohort, strong, unlike=unlike))
                overlaps += found.lambdas if rule == "overlap" else []
        console.print(losses(outcomes))
        console.print(advantages(outcomes))
        print(f"factors of overlap counted once, mean: {_factors(overlaps)}")
    seconds = math.fsum(run.seconds for run in place.runs.values())
    print(
        f"{len(place.runs)} runs took {seconds / 60:.1f} min of one processor, models not counted"
    )


def _factors(rounds: Sequence[Mapping[str, float]]) -> str:
    """Mean and least of each family's over all rounds."""
    found = {family: [one[family] for one in rounds] for family in rounds[0]}
    return ", ".join(
        f"{family} {math.fsum(some) / len(some):.4f} (least {min(some):.4f})"
        for family, some in found.items()
    )


if __name__ == "__main__":
    typer.run(main)
