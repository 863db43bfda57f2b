"""What a public basis is worth: the loss after some rounds of projected updates, at equal bytes.

    python -m simulations.benchmarks.adaptive_basis
    python -m simulations.benchmarks.adaptive_basis --model FOLDER --source FILE --source FILE:CATEGORY

Nodes with unlike data train all weights by backpropagation. Their changes reach the server whole
("full"), through random probes, or through the adaptive basis, as many numbers either way, round by
round; and a last time with steps that stay within that basis, of which a sketch leaves out nothing. The
model is a small Llama that has read a manual (``small_language``), or any causal model's folder; the
nodes' data are topics of the embedded conversations, or files. A second table says what each round did:
what was read of the mean change, and what error feedback holds back.
"""

from __future__ import annotations

import functools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedkernels as fk
from aggregators import Basis, Dense, Layout, Sketch, aggregate, allocation, encode
from aggregators.methods import FirstOrderMethod, ProjectedMethod, SketchMethod
from fedclient.data import Tokens, batches, eval_batches, tokenise
from fedclient.local import first_order, projection
from fedclient.loss import answer_loss
from fedclient.records import EMBEDDED, Example, read_examples
from fedserver.intervals import estimate
from simulations.benchmarks.small_language import (
    MAX_LENGTH,
    TEMPLATE,
    manual,
    tokenizer,
    write_model,
)
from simulations.benchmarks.tables import table_console

# Topics of the embedded conversations, one a node; the model has read the others.
TOPICS = ("trivia", "emotion", "conversations", "coding", "ai", "psychology")
METHODS = {
    "full": "whole changes",
    "random": "random probes, unbiased",
    "random, feedback": "random probes, MMSE scale, error feedback",
    "adaptive": "adaptive basis, free steps",
    "adaptive, feedback": "adaptive basis, free steps, error feedback",
    "adaptive, within": "adaptive basis, steps within it",
}
ROWS, HELD_OUT = 300, 40  # of a node


@dataclass(frozen=True)
class Case:
    """One run's constants. Bytes are those of ``wire_dtype`` messages."""

    rounds: int = 6
    local_steps: int = 20
    batch_size: int = 8
    learning_rate: float = 1e-3
    rank: int = 4
    oversampling: int = 2
    wire_dtype: str = "float16"
    optimiser: str = "adamw"
    hidden: int = 128


@dataclass(frozen=True)
class Step:
    """A round's step s beside the mean c of the nodes' changes: cosine, |s| / |c|; the mean residual.

    ``residual`` is its norm before the round over |c|; ``again`` its cosine with c: what the nodes'
    training has found again, and error feedback applies a second time.
    """

    cosine: float
    length: float
    residual: float
    again: float


@dataclass(frozen=True)
class Result:
    """Loss in nats per answer token of all nodes' held-out data, at the start and after each round."""

    method: str
    seed: int
    losses: tuple[float, ...]
    steps: tuple[Step, ...]
    bytes_per_message: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Nodes:
    """Token ids of each node: what it trains on, what it holds out."""

    train: list[list[Tokens]]
    held_out: list[list[Tokens]]


@dataclass(frozen=True)
class Place:
    """Where models and nodes' data come from: a folder and files, or the embedded conversations."""

    words: Any
    base: Path | None
    read: Sequence[Example]
    parts: Sequence[Sequence[Example]]

    @classmethod
    def of(cls, base: Path | None, sources: Sequence[str]) -> Place:
        """``sources``: FILE or FILE:CATEGORY, a node each; none: the topics."""
        parts = [_source(source) for source in sources] or _topics()
        if base is None:
            held = [example for part in parts for example in part]
            kept = set(held)
            talks = [e for e in dict.fromkeys(read_examples(EMBEDDED)) if e not in kept]
            read = [*talks, *manual()]
            return cls(tokenizer([*held, *read[: 2 * len(held)]]), None, read, parts)
        words = AutoTokenizer.from_pretrained(base)
        words.chat_template = words.chat_template or TEMPLATE
        return cls(words, base, (), parts)

    def model(self, case: Case, seed: int) -> nn.Module:
        """The base model; a small one of this seed where none is given."""
        if self.base is not None:
            return _loaded(self.base)
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), self.words, self.read, seed, hidden=case.hidden)
            return _loaded(Path(folder))

    def nodes(self, seed: int) -> Nodes:
        """``ROWS`` of each part, by a seed's order; the last ``HELD_OUT`` of them are held out."""
        train, held_out = [], []
        for part in self.parts:
            drawn = random.Random(seed).sample(part, min(len(part), ROWS))
            tokens = tokenise(drawn, self.words, MAX_LENGTH)
            train.append(tokens[:-HELD_OUT])
            held_out.append(tokens[-HELD_OUT:])
        return Nodes(train, held_out)


def _topics() -> list[list[Example]]:
    """The embedded conversations of each topic, none twice."""
    unique = list(dict.fromkeys(read_examples(EMBEDDED)))
    return [[example for example in unique if example.category == topic] for topic in TOPICS]


def _source(source: str) -> list[Example]:
    path, _, category = source.partition(":")
    examples = read_examples(path, "category" if category else None)
    return [e for e in examples if not category or e.category == category]


def _loaded(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def evaluate(model: nn.Module, nodes: Nodes) -> float:
    """Mean loss per answer token over all nodes' held-out data."""
    total, tokens = 0.0, 0
    for held_out in nodes.held_out:
        for batch in eval_batches(held_out, 32, 0):
            loss_sum, labelled, _ = answer_loss(model, batch)
            total, tokens = total + float(loss_sum), tokens + labelled
    return total / tokens


class Server:
    """Weights, what the last aggregate was, and how each method's messages become a change."""

    def __init__(self, model: nn.Module, method: str, case: Case, seed: int, nodes: int) -> None:
        self.layout, self.method, self.case, self.seed = (
            Layout.from_model(model), method, case, seed,
        )  # fmt: skip
        self.weights = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        names = [spec.name for spec in self.layout]
        self.basis = Basis.random(self.layout, names, seed, case.rank, case.oversampling)
        self.norms = {name: math.sqrt(math.prod(self.layout.shape(name))) for name in names}
        self.residuals: list[dict[str, Tensor]] = [{} for _ in range(nodes)]

    def asked(self, number: int) -> FirstOrderMethod:
        """What the nodes are to do in a round."""
        common: dict[str, Any] = {
            "target_modules": (),
            "master_seed": fk.derive_seed(self.seed, number),
            "optimiser": self.case.optimiser,
            "error_feedback": self.method.endswith("feedback"),
        }
        if self.method.startswith("random"):
            return ProjectedMethod(
                **common,
                probe="rademacher",
                coordinates=allocation(self.norms, self.basis.size),
                scale="mmse" if common["error_feedback"] else "unbiased",
            )
        if self.method.startswith("adaptive"):
            return SketchMethod(
                **common,
                rank=self.case.rank,
                oversampling=self.case.oversampling,
                within=self.within,
            )
        return FirstOrderMethod(**common)

    @property
    def within(self) -> bool:
        """Whether nodes' steps stay within the basis."""
        return self.method.endswith("within")

    def message(self, index: int, method: FirstOrderMethod, change: Mapping[str, Tensor]) -> Any:
        """What node ``index`` sends; it keeps what is left."""
        residual, dtype = self.residuals[index], self.case.wire_dtype
        if isinstance(method, ProjectedMethod):
            update, self.residuals[index] = projection.project(
                self.layout, method, change, residual, dtype
            )
            return update
        if isinstance(method, SketchMethod):
            seen, self.residuals[index] = projection.sketch(
                self.layout, method, self.basis, change, residual, dtype
            )
            return seen
        return Dense(self.layout, change)

    def add(self, messages: Sequence[tuple[Any, float]], method: FirstOrderMethod) -> None:
        """Add the mean of the changes, and learn for the next round."""
        mean: Any
        (mean,) = aggregate(messages, self.layout).updates.values()
        changes: list[Any] = [mean]
        if isinstance(mean, Sketch):
            changes = [mean.reconstruct(self.basis, self.within), mean.whole_change()]
            self.basis = self.basis.refined(mean)
        elif isinstance(method, ProjectedMethod) and method.scale == "mmse":
            changes = [mean.shrunk()]
        for change in changes:
            for name, tensor in change.dense().items():
                self.weights[name] += tensor
                self.norms[name] = float(tensor.norm())
        if isinstance(method, ProjectedMethod) and not self.basis.refinement:
            # As many numbers as a sketch of the same round has: the first basis is wider.
            nothing = {spec.name: torch.zeros(spec.shape) for spec in self.layout}
            self.basis = self.basis.refined(Sketch.of(self.layout, self.basis, nothing))

    def load(self, model: nn.Module) -> None:
        """Write the weights into a model."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.weights[name])


def run(
    model: nn.Module, nodes: Nodes, method: str, case: Case, seed: int, done: Callable[[], object]
) -> Result:
    """All rounds of one method from the weights of ``model``, which is used up; ``done`` after each."""
    server = Server(model, method, case, seed, len(nodes.train))
    losses, steps, sizes = [evaluate(model, nodes)], [], []
    started = time.perf_counter()
    for number in range(case.rounds):
        asked = server.asked(number)
        messages, changes, residuals = [], [], list(server.residuals)
        before = {name: weight.clone() for name, weight in server.weights.items()}
        for index, tokens in enumerate(nodes.train):
            server.load(model)
            chance = fk.derive_seed(seed, 1000 * (number + 1) + index)
            change, _ = first_order.train(
                model, server.layout,
                batches(tokens, case.batch_size, case.local_steps, chance, 0),
                asked, seed=chance, learning_rate=case.learning_rate, steps=case.local_steps,
                basis=server.basis if server.within else None,
            )  # fmt: skip
            # By data, as in any mean; the root keeps the one large topic from being all of it.
            messages.append((server.message(index, asked, change), math.sqrt(len(tokens))))
            changes.append(change)
        sizes.append(len(encode(messages[0][0], case.wire_dtype)))
        server.add(messages, asked)
        server.load(model)
        losses.append(evaluate(model, nodes))
        weights = [weight for _, weight in messages]
        moved = _flat({name: server.weights[name] - old for name, old in before.items()})
        steps.append(_step(moved, _mean(changes, weights), _mean(residuals, weights)))
        done()
    elapsed = time.perf_counter() - started
    return Result(method, seed, tuple(losses), tuple(steps), tuple(sizes), elapsed)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def _mean(parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensor | None:
    if not all(parts):
        return None
    total = sum(weight * _flat(part) for part, weight in zip(parts, weights, strict=True))
    return total / sum(weights) if isinstance(total, Tensor) else None


def _step(moved: Tensor, change: Tensor | None, residual: Tensor | None) -> Step:
    assert change is not None
    length = float(change.norm())
    cosine = float(moved @ change) / (float(moved.norm()) * length)
    if residual is None:
        return Step(cosine, float(moved.norm()) / length, 0.0, 0.0)
    left = float(residual.norm())
    again = float(residual @ change) / (left * length)
    return Step(cosine, float(moved.norm()) / length, left / length, again)


def closed(results: Sequence[Result], seeds: Sequence[int], against: str, method: str) -> float:
    """The share of the gap between random probes and whole changes that ``method`` closes.

    Of losses summed over ``seeds``: single gaps may be near 0, and a mean of ratios says nothing then.
    """
    last = dict.fromkeys(METHODS, 0.0)
    for result in results:
        if result.seed in seeds:
            last[result.method] += result.losses[-1]
    return (last[against] - last[method]) / (last[against] - last["full"])


def table(results: Sequence[Result], case: Case, nodes: int) -> Table:
    """Loss after the last round, a method a row, with its spread over the seeds."""
    seeds = sorted({result.seed for result in results})
    found = Table(
        title=f"{nodes} nodes, {case.rounds} rounds of {case.local_steps} steps,"
        f" {len(seeds)} seeds, basis of rank {case.rank} + {case.oversampling}",
        caption="loss: nats per answer token, all nodes' held-out data; gap closed: of the mean losses"
        " (mean and 95 % t interval of the single seeds'), between random probes and whole changes;"
        " bytes: of one node's messages",
    )
    for heading in (
        "method",
        "loss",
        "± 95 %",
        "gap to unbiased",
        "gap to feedback",
        "bytes",
        "seconds",
    ):
        found.add_column(heading, justify="left" if heading == "method" else "right")
    starts = [r.losses[0] for r in results if r.method == "full"]
    found.add_row("start", f"{statistics.mean(starts):.4f}", _spread(starts), "", "", "", "")
    for name, text in METHODS.items():
        mine = [result for result in results if result.method == name]
        if not mine:
            continue
        ends = [result.losses[-1] for result in mine]
        found.add_row(
            text, f"{statistics.mean(ends):.4f}", _spread(ends),
            *(_gap(results, seeds, against, name) for against in ("random", "random, feedback")),
            f"{sum(mine[0].bytes_per_message):,}",
            f"{statistics.mean(r.seconds for r in mine):.0f}",
        )  # fmt: skip
    return found


def rounds_table(results: Sequence[Result]) -> Table:
    """What each round did, means over the seeds."""
    found = Table(
        title="round by round: loss; cosine of the step with the mean change, its length over the"
        " change's; residual over the change, and its cosine with it",
    )
    found.add_column("method")
    for number in range(max(len(result.steps) for result in results)):
        found.add_column(str(number + 1))
    for name, text in METHODS.items():
        mine = [result for result in results if result.method == name]
        if not mine:
            continue
        cells = []
        for number in range(len(mine[0].steps)):
            loss = statistics.mean(result.losses[number + 1] for result in mine)
            here = [result.steps[number] for result in mine]
            cosine, length, residual, again = (
                statistics.mean(getattr(step, field) for step in here)
                for field in ("cosine", "length", "residual", "again")
            )
            kept = f"\n{residual:.2f} {again:+.2f}" if residual else ""
            cells.append(f"{loss:.3f}\n{cosine:.2f} {length:.2f}{kept}")
        found.add_row(text, *cells)
    return found


def _gap(results: Sequence[Result], seeds: Sequence[int], against: str, method: str) -> str:
    each = [closed(results, [seed], against, method) for seed in seeds]
    listed = ", ".join(f"{share:.0%}" for share in each)
    overall = f"{closed(results, seeds, against, method):.0%}"
    found = estimate(each)
    if found is None or found.half_width is None:
        return overall
    return f"{overall} ({found.mean:.0%} ± {found.half_width:.0%}: {listed})"


def main(
    model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="of a causal model; else a small one")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:CATEGORY]", help="a node's JSON lines")
    ] = None,
    seeds: Annotated[int, typer.Option(help="number of seeds", min=1)] = 3,
    rounds: Annotated[int, typer.Option(min=1)] = Case.rounds,
    local_steps: Annotated[int, typer.Option(min=1)] = Case.local_steps,
    learning_rate: float = Case.learning_rate,
    rank: Annotated[int, typer.Option(min=1)] = Case.rank,
    oversampling: Annotated[int, typer.Option(min=0)] = Case.oversampling,
    threads: Annotated[int, typer.Option(min=1, help="so small a model gains little by more")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="seeds are this one and the next")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Run every method for every seed and print losses, gaps and bytes."""
    torch.set_num_threads(threads)
    case = Case(
        rounds=rounds, local_steps=local_steps, learning_rate=learning_rate,
        rank=rank, oversampling=oversampling,
    )  # fmt: skip
    place = Place.of(model, source or [])
    results = []
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("training", total=seeds * len(METHODS) * rounds)
        for seed in range(first_seed, first_seed + seeds):
            trained = place.model(case, seed)
            start = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
            nodes = place.nodes(seed)
            for method in METHODS:
                trained.load_state_dict(start)
                progress.update(task, description=f"seed {seed}, {method}")
                advance = functools.partial(progress.advance, task)
                results.append(run(trained, nodes, method, case, seed, advance))
                if as_json:
                    print(json.dumps(asdict(results[-1])), flush=True)
    if not as_json:
        console = table_console()
        console.width = console.width if console.is_terminal else 150
        console.print(table(results, case, len(place.parts)))
        console.print(rounds_table(results))


def _spread(values: Sequence[float]) -> str:
    found = estimate(values)
    return f"{found.half_width:.4f}" if found and found.half_width is not None else ""


if __name__ == "__main__":
    typer.run(main)
