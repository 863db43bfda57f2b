"""Parity with MeZO and FedKSeed: the same Gaussian probes, the same scalars, the same losses.

    python -m simulations.benchmarks.zeroth_order_parity

The references are written here in plain torch after the papers: MeZO (Malladi et al., 2023, algorithm 1)
moves all weights in place by +epsilon, -2 epsilon, +epsilon and the update; FedKSeed (Qin et al., 2024,
section 3) draws seeds of a pool and accumulates one scalar a seed, from which the weights are rebuilt.
Both get the z that fedbraid's kernels make. The model is a small Llama of random weights, the data texts
of a Markov chain that it can learn; the steps are the same batches for all.

In float64 the mathematics alone is compared (but for transformers' norms, which round to float32). In
float32 a loss of some nats has an error of 1e-8 of it, and g divides the difference of two by 2 epsilon:
that is what scalars can agree to.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import fedkernels as fk
from aggregators import Layout, SeedScalars
from aggregators.methods import ZerothOrderMethod
from aggregators.seed_sampling import drawn_indices
from fedclient.local.zeroth_order import train

VOCABULARY, BATCH, LENGTH = 64, 8, 24
MASTER_SEED, DRAW_SEED = 17, 5
PROBE: Literal["gaussian"] = "gaussian"


@dataclass(frozen=True)
class Run:
    """A walk: mean losses by step, sums of -learning_rate * g by pool index, weights at its end."""

    losses: list[float]
    scalars: list[float]
    weights: dict[str, Tensor]


def small_model(dtype: torch.dtype) -> Any:
    """A Llama of 2 layers and random weights, some 50,000 of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    configuration = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(configuration)
    return model.to(dtype).eval().requires_grad_(False)


def batches(steps: int) -> Iterator[dict[str, Tensor]]:
    """Texts in which a token decides the next one but for every eighth."""
    chance = torch.Generator().manual_seed(4)
    following = torch.randperm(VOCABULARY, generator=chance)
    for _ in range(steps):
        ids = torch.empty(BATCH, LENGTH, dtype=torch.int64)
        ids[:, 0] = torch.randint(VOCABULARY, (BATCH,), generator=chance)
        for place in range(1, LENGTH):
            ids[:, place] = following[ids[:, place - 1]]
            lost = torch.rand(BATCH, generator=chance) < 1 / 8
            ids[lost, place] = torch.randint(VOCABULARY, (int(lost.sum()),), generator=chance)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def loss(model: Any, batch: dict[str, Tensor]) -> float:
    """Mean cross-entropy; transformers' own is rounded to float32 whatever the model's type."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, :-1].double()
    return float(functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()))


def ours(model: Any, steps: int, method: ZerothOrderMethod, learning_rate: float) -> Run:
    """fedbraid's walk; scalars by pool index, in its order."""
    layout = Layout.from_model(model)
    losses: list[float] = []
    update, _ = train(
        model, layout, batches(steps), method,
        seed=DRAW_SEED, learning_rate=learning_rate, steps=steps,
        progress=lambda step, of, loss: losses.append(loss),
    )  # fmt: skip
    assert isinstance(update, SeedScalars)
    totals = dict(zip(update.indices.tolist(), update.scalars.tolist(), strict=True))
    scalars = [totals[k] for k in sorted(totals)]
    return Run(losses, scalars, {name: p.clone() for name, p in model.named_parameters()})


def plain_mezo(model: Any, steps: int, method: ZerothOrderMethod, learning_rate: float) -> Run:
    """MeZO's algorithm 1 with weights moved in place; scalars summed by pool index."""
    layout, epsilon = Layout.from_model(model), method.epsilon
    draws = drawn_indices(DRAW_SEED, method.pool_size)
    losses: list[float] = []
    totals: dict[int, float] = {}

    def move(seed: int, scale: float) -> None:
        for name, parameter in model.named_parameters():
            z = fk.noise(seed, layout.tensor_id(name), parameter.shape, PROBE)
            parameter.data.add_(z.to(parameter.dtype), alpha=scale)

    for batch in batches(steps):
        index = next(draws)
        seed = fk.derive_seed(MASTER_SEED, index)
        with torch.no_grad():
            move(seed, epsilon)
            up = loss(model, batch)
            move(seed, -2 * epsilon)
            down = loss(model, batch)
            move(seed, epsilon)
            slope = (up - down) / (2 * epsilon)
            move(seed, -learning_rate * slope)
        losses.append((up + down) / 2)
        totals[index] = totals.get(index, 0.0) - learning_rate * slope
    weights = {name: p.clone() for name, p in model.named_parameters()}
    return Run(losses, [totals[k] for k in sorted(totals)], weights)


def plain_fedkseed(model: Any, steps: int, method: ZerothOrderMethod, learning_rate: float) -> Run:
    """FedKSeed's client: every loss at weights rebuilt from the start and the scalars of all seeds."""
    layout, epsilon = Layout.from_model(model), method.epsilon
    start = {name: p.clone() for name, p in model.named_parameters()}
    draws = drawn_indices(DRAW_SEED, method.pool_size)
    losses: list[float] = []
    totals: dict[int, float] = {}
    probes: dict[int, dict[str, Tensor]] = {}

    def rebuild(more: dict[int, float]) -> None:
        for name, parameter in model.named_parameters():
            change = torch.zeros(parameter.shape, dtype=torch.float64)
            for index, amount in [*totals.items(), *more.items()]:
                change += amount * probes[index][name].double()
            parameter.data.copy_(start[name].double() + change)

    for batch in batches(steps):
        index = next(draws)
        seed = fk.derive_seed(MASTER_SEED, index)
        probes[index] = {
            spec.name: fk.noise(seed, spec.tensor_id, spec.shape, PROBE) for spec in layout
        }
        values = []
        with torch.no_grad():
            for scale in (epsilon, -epsilon):
                rebuild({index: scale})
                values.append(loss(model, batch))
        slope = (values[0] - values[1]) / (2 * epsilon)
        losses.append(sum(values) / 2)
        totals[index] = totals.get(index, 0.0) - learning_rate * slope
    rebuild({})
    weights = {name: p.clone() for name, p in model.named_parameters()}
    return Run(losses, [totals[k] for k in sorted(totals)], weights)


def compare(mine: Run, reference: Run) -> dict[str, float]:
    """Largest relative differences: of scalars to the largest scalar, losses to the loss."""
    largest = max(abs(value) for value in reference.scalars)
    pairs = zip(mine.scalars, reference.scalars, strict=True)
    curves = zip(mine.losses, reference.losses, strict=True)
    distance = math.sqrt(
        sum(
            float((mine.weights[name].double() - weight.double()).square().sum())
            for name, weight in reference.weights.items()
        )
    )
    return {
        "scalars": max(abs(a - b) for a, b in pairs) / largest,
        "losses": max(abs(a / b - 1) for a, b in curves),
        "weights": distance,
        "first_loss": reference.losses[0],
        "last_loss": sum(reference.losses[-10:]) / len(reference.losses[-10:]),
    }


def measure(
    steps: int, pool: int, epsilon: float, learning_rate: float
) -> Iterator[dict[str, Any]]:
    """A row for each reference and type of weights."""
    method = ZerothOrderMethod(
        master_seed=MASTER_SEED, pool_size=pool, probe=PROBE, epsilon=epsilon, clip=None
    )
    for dtype in (torch.float64, torch.float32):
        start = small_model(dtype)
        mine = ours(copy.deepcopy(start), steps, method, learning_rate)
        for name, reference in (("MeZO", plain_mezo), ("FedKSeed", plain_fedkseed)):
            theirs = reference(copy.deepcopy(start), steps, method, learning_rate)
            row = {"reference": name, "dtype": str(dtype).removeprefix("torch.")}
            yield row | compare(mine, theirs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pool", type=int, default=1024)
    parser.add_argument("--epsilon", type=float, default=1e-2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    options = parser.parse_args()
    table = Table(title=f"{options.steps} steps, pool of {options.pool}, {PROBE} probes")
    for heading in ("reference", "weights", "first loss", "last 10", "scalars differ by",
                    "losses differ by", "weights' distance"):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in measure(options.steps, options.pool, options.epsilon, options.learning_rate):
        if options.json:
            print(json.dumps(row))
        table.add_row(
            row["reference"], row["dtype"], f"{row['first_loss']:.4f}", f"{row['last_loss']:.4f}",
            f"{row['scalars']:.1e}", f"{row['losses']:.1e}", f"{row['weights']:.1e}",
        )  # fmt: skip
    if not options.json:
        Console(width=110).print(table)
        print("bars: scalars within 1e-5 (of the largest), losses within 1 %")


if __name__ == "__main__":
    main()
