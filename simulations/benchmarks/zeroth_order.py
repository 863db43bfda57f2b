"""A zeroth-order step of SmolLM2-135M against two plain forward passes: seconds, memory, bytes.

    python -m simulations.benchmarks.zeroth_order --steps 15

Every variant runs in a process of its own, and the steps are taken in turns, so that whatever else the
machine does hits all alike. All see the same 4 × 128 tokens (frequencies after Zipf's law, every
position labelled). "Plain" is transformers alone. The reference MeZO step moves all weights in place by
+epsilon, -2 epsilon, +epsilon and the update, each with noise drawn anew by torch (Malladi et al., 2023,
algorithm 1). Memory is the peak of resident memory after loading.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fedkernels as fk
from aggregators import Layout, SeedScalars, encode
from aggregators.codec import pack
from fedclient.local.perturbation import Perturbable, perturbable
from fedclient.memory import PeakMemory

BATCH, LENGTH = 4, 128
WARM_UP = 2
EPSILON, LEARNING_RATE = 1e-3, 1e-6
POOL, LOCAL_STEPS = 4096, 200


@dataclass(frozen=True)
class Variant:
    """What a process does; ``reference`` is the variant that its seconds are divided by."""

    title: str
    reference: str
    work: str  # "forward", "inference", "mezo", or a probe
    dtype: torch.dtype = torch.float32
    fmt: str | None = None
    walked: int = 0
    bar: str = ""


BF16 = torch.bfloat16
VARIANTS = {
    "forward": Variant("two plain forward passes, fp32", "forward", "forward"),
    "mezo": Variant("reference MeZO step, fp32", "forward", "mezo"),
    "rank1": Variant("rank1, fp32", "forward", "rank1", bar="≤ 1.10"),
    "rademacher": Variant("rademacher, fp32", "forward", "rademacher", bar="≤ 1.10"),
    "forward-bf16": Variant("two plain forward passes, bf16", "forward-bf16", "forward", BF16),
    "rank1-bf16": Variant("rank1, bf16", "forward-bf16", "rank1", BF16, bar="≤ 1.10"),
    "forward-nf4": Variant(
        "two plain forward passes, NF4 base", "forward-nf4", "forward", fmt="nf4"
    ),
    "rank1-nf4": Variant("rank1, NF4 base", "forward-nf4", "rank1", fmt="nf4", bar="≤ 1.15"),
    "rank1-nf4-walked": Variant(
        f"rank1, NF4 base, after {LOCAL_STEPS} steps",
        "forward-nf4", "rank1", fmt="nf4", walked=LOCAL_STEPS, bar="≤ 1.15",
    ),
}  # fmt: skip
# Peak memory: each against inference of the same model.
MEMORY = {
    "inference": Variant("inference, fp32: logits of the last position", "inference", "inference"),
    "forward": Variant("inference, fp32: logits of all positions", "inference", "forward"),
    "rank1": Variant("rank1, fp32", "inference", "rank1", bar="≤ 1.05"),
    "rademacher": Variant("rademacher, fp32", "inference", "rademacher", bar="≤ 1.05"),
    "mezo": Variant("reference MeZO step, fp32", "inference", "mezo"),
    "inference-bf16": Variant("inference, bf16", "inference-bf16", "inference", BF16),
    "rank1-bf16": Variant("rank1, bf16", "inference-bf16", "rank1", BF16, bar="≤ 1.05"),
    "inference-nf4": Variant("inference, NF4 base", "inference-nf4", "inference", fmt="nf4"),
    "rank1-nf4": Variant(
        f"rank1, NF4 base, after {LOCAL_STEPS} steps",
        "inference-nf4", "rank1", fmt="nf4", walked=LOCAL_STEPS, bar="≤ 1.05",
    ),
}  # fmt: skip


@dataclass
class Record:
    """What one variant did: seconds of each step, those of all its threads, and bytes."""

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    loaded_bytes: int = 0

    def settled(self, processor: bool = False) -> list[float]:
        """Without the first steps, in which torch and the caches settle."""
        seconds = self.processor_seconds if processor else self.seconds
        return seconds[WARM_UP:] or seconds


def measure(
    variants: Sequence[str], steps: int, threads: int, model: str, memory: bool = False
) -> dict[str, Record]:
    """Run ``steps`` steps of every variant, in turns; for ``memory`` one process after the other."""
    records = {name: Record() for name in variants}
    for group in [[name] for name in variants] if memory else [list(variants)]:
        with _workers(group, threads, model, memory) as workers:
            for _ in range(steps):
                for name, worker in workers.items():
                    answer = _ask(worker, "step")
                    records[name].seconds.append(answer["seconds"])
                    records[name].processor_seconds.append(answer["processor_seconds"])
            for name, worker in workers.items():
                answer = _ask(worker, "end")
                records[name].peak_bytes = answer["peak_bytes"]
                records[name].loaded_bytes = answer["loaded_bytes"]
    return records


def wire_bytes(layout: Layout, seed: int = 1) -> dict[str, int]:
    """Bytes of the body of an upload after ``LOCAL_STEPS`` steps, by wire type, and of dense totals.

    The scalars are normal; the indices are those of a node that draws with replacement.
    """
    from aggregators.seed_sampling import drawn_indices

    draws = drawn_indices(seed, POOL)
    indices = sorted({next(draws) for _ in range(LOCAL_STEPS)})
    scalars = torch.randn(len(indices), generator=torch.Generator().manual_seed(seed)) * 1e-6
    update = SeedScalars(layout, fk.derive_seed(seed, 0), POOL, indices, scalars.double(), "rank1")
    sizes = {dtype: len(encode(update, dtype)) for dtype in ("int8", "float16", "float32")}
    for dtype in (torch.int16, torch.int32):
        totals = torch.zeros(POOL, dtype=dtype)
        sizes[f"dense {str(dtype).removeprefix('torch.')}"] = len(pack({}, {"totals": totals}))
    return {"probes": len(indices)} | sizes


def random_batch(vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """Tokens whose frequencies follow Zipf's law, all of them labelled."""
    frequencies = 1 / torch.arange(1, vocabulary + 1)
    random = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(frequencies, BATCH * LENGTH, True, generator=random)
    ids = ids.view(BATCH, LENGTH)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class PlainMezo:
    """MeZO as published: weights are moved in place, with the noise of one seed drawn four times."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._steps = 0

    def step(self, batch: dict[str, Tensor]) -> None:
        """Two forward passes, three perturbations, one update."""
        self._steps += 1
        losses = []
        for scale in (1.0, -2.0):
            self._move(scale * EPSILON)
            losses.append(float(self._model(**batch, use_cache=False).loss))
        self._move(EPSILON)
        slope = (losses[0] - losses[1]) / (2 * EPSILON)
        self._move(-LEARNING_RATE * slope)

    def _move(self, scale: float) -> None:
        torch.manual_seed(self._steps)
        for parameter in self._model.parameters():
            noise = torch.normal(mean=0.0, std=1.0, size=parameter.shape, dtype=parameter.dtype)
            parameter.data.add_(noise, alpha=scale)


@contextmanager
def _workers(
    names: Sequence[str], threads: int, model: str, memory: bool
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", __spec__.name, "--threads", str(threads), "--model", model]
    command += ["--memory-only"] if memory else []
    workers = {
        name: subprocess.Popen(
            [*command, "--worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for name in names
    }  # fmt: skip
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()


def _ask(worker: subprocess.Popen[str], request: str) -> dict[str, Any]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(request + "\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    raise RuntimeError("a worker of the benchmark ended early; its error is above")


def _work(variant: Variant, threads: int, reference: str) -> None:
    """One variant's process: a step for every line that comes in."""
    torch.set_num_threads(threads)
    model, layout = _model(variant, reference)
    batch = random_batch(model.config.vocab_size)
    memory = PeakMemory(collect=True)
    with torch.no_grad(), _stepper(variant, model, layout, batch) as step:
        for request in sys.stdin:
            if request.strip() == "end":
                peak = memory.read()
                print(json.dumps({"peak_bytes": peak.most, "loaded_bytes": peak.before}))
                return
            start, processor_start = time.perf_counter(), time.process_time()
            step()
            taken = {
                "seconds": time.perf_counter() - start,
                "processor_seconds": time.process_time() - processor_start,
            }
            print(json.dumps(taken), flush=True)


@contextmanager
def _stepper(
    variant: Variant, model: Any, layout: Layout, batch: dict[str, Tensor]
) -> Iterator[Callable[[], object]]:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if variant.work == "inference":
        yield lambda: model(**inputs, logits_to_keep=1)
    elif variant.work == "forward":
        yield lambda: [float(model(**batch, use_cache=False).loss) for _ in range(2)]
    elif variant.work == "mezo":
        mezo = PlainMezo(model)
        yield lambda: mezo.step(batch)
    else:
        with perturbable(model, layout, variant.work) as asked:
            if variant.walked:
                asked.move({fk.derive_seed(1, k): 1e-9 for k in range(variant.walked)})
            step = iter(range(variant.walked, POOL))
            yield lambda: _zeroth_order_step(asked, batch, fk.derive_seed(1, next(step)))


def _zeroth_order_step(asked: Perturbable, batch: dict[str, Tensor], seed: int) -> None:
    up, down = asked.predictions(batch, [(seed, EPSILON), (seed, -EPSILON)])
    asked.move({seed: -LEARNING_RATE * (up.loss - down.loss) / (2 * EPSILON)})


def _model(variant: Variant, reference: str) -> tuple[Any, Layout]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from fedclient.base_model import resolve

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(resolve(reference), dtype=variant.dtype)
    model.eval().requires_grad_(False)
    layout = Layout.from_model(model)
    if variant.fmt is not None:
        fk.quantize_linears(model, variant.fmt)
        fk.quantize_embeddings(model)
    # What still lies in the file's pages keeps all of them resident, or is read in the first step.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, layout


def _rows(
    variants: dict[str, Variant], records: dict[str, Record], memory: bool
) -> list[dict[str, Any]]:
    rows = []
    for name, record in records.items():
        variant = variants[name]
        row: dict[str, Any] = {"variant": name, "title": variant.title, "bar": variant.bar}
        other = records.get(variant.reference)
        if memory:
            row["peak_bytes"], row["loaded_bytes"] = record.peak_bytes, record.loaded_bytes
            row["ratio"] = record.peak_bytes / other.peak_bytes if other else None
        else:
            row["seconds"] = statistics.median(record.settled())
            row["least_seconds"] = min(record.settled())
            row["ratio"] = _median_ratio(record, other, processor=False)
            row["least_ratio"] = min(record.settled()) / min(other.settled()) if other else None
            row["processor_ratio"] = _median_ratio(record, other, processor=True)
        rows.append(row)
    return rows


def _median_ratio(record: Record, other: Record | None, processor: bool) -> float | None:
    """Of the steps that were taken in one turn: both met the same load."""
    if other is None:
        return None
    pairs = zip(record.settled(processor), other.settled(processor), strict=True)
    return statistics.median(a / b for a, b in pairs)


def _print(
    seconds: list[dict[str, Any]], memory: list[dict[str, Any]], wire: dict[str, int]
) -> None:
    console = Console(width=110)
    table = Table(title=f"SmolLM2-135M, {BATCH} × {LENGTH} tokens, one step")
    for heading in ("step", "median", "least", "÷ two plain passes: median", "least",
                    "processor time", "bar"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for row in seconds:
        ratios = (
            "" if row[key] is None else f"{row[key]:.2f} ×"
            for key in ("ratio", "least_ratio", "processor_ratio")
        )  # fmt: skip
        times = f"{row['seconds']:.2f} s", f"{row['least_seconds']:.2f} s"
        table.add_row(row["title"], *times, *ratios, row["bar"])
    console.print(table)
    table = Table(title="peak of resident memory")
    for heading in ("process", "loaded", "peak", "÷ inference", "bar"):
        table.add_column(heading, justify="left" if heading == "process" else "right")
    for row in memory:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f} ×"
        sizes = (f"{row[key] / 2**20:.0f} MiB" for key in ("loaded_bytes", "peak_bytes"))
        table.add_row(row["title"], *sizes, ratio, row["bar"])
    console.print(table)
    table = Table(title=f"bytes of an upload, {LOCAL_STEPS} steps, pool of {POOL}")
    for heading in ("form", "bytes", "bar"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for form, size in wire.items():
        bar = {"int8": "≤ 764", "dense int32": "≤ 16,500"}.get(form, "")
        table.add_row(form, f"{size:,}", bar)
    console.print(table)


def main() -> None:
    """Measure and print, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        known = MEMORY if options.memory_only else VARIANTS
        _work(known[options.worker], options.threads, options.model)
        return
    names = options.variants.split(",")
    timed = {} if options.memory_only else measure(
        names, options.steps, options.threads, options.model
    )  # fmt: skip
    remembered = {} if options.skip_memory else measure(
        list(MEMORY), 2, options.threads, options.model, memory=True
    )  # fmt: skip
    wire = wire_bytes(_model(VARIANTS["forward"], options.model)[1])
    seconds = _rows(VARIANTS, timed, memory=False)
    memory = _rows(MEMORY, remembered, memory=True)
    if options.json:
        for row in [*seconds, *memory, {"wire": wire}]:
            print(json.dumps(row, ensure_ascii=False))
    else:
        _print(seconds, memory, wire)


if __name__ == "__main__":
    main()
