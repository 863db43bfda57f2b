"""The local LoRA step of SmolLM2-135M: plain transformers and peft against `fk.accelerate`.

    python -m simulations.benchmarks.kernels.training_step --steps 50

Each variant trains in a process of its own, so that its peak memory is its own; the steps are taken
in turns, one variant at a time, so that whatever else the machine does hits all alike. All variants
see the same 4 × 256 tokens in each step (frequencies after Zipf's law, every position labelled) and
start from the same factors (rank 8 on all linears, AdamW, learning rate 1e-3).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import fedkernels as fk
from fedclient.memory import PeakMemory
from simulations.benchmarks.kernels.row import Row

BATCH, LENGTH, RANK = 4, 256, 8
WARM_UP = 2
VARIANTS = ("plain", "accelerated", "nf4")
NAMES = {
    "plain": "plain transformers + peft, bf16",
    "accelerated": "accelerated, bf16 base",
    "nf4": "accelerated, NF4 base (embedding int8)",
}
TARGETS = {
    "accelerated": "≥ 1.6 × tokens/s, ≤ 0.75 × memory, losses within 1 %",
    "nf4": "≥ 1.3 × tokens/s, ≤ 0.35 × weights",
}


@dataclass
class Record:
    """What one variant did: wall and processor seconds and loss of each step, bytes at the end."""

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    weight_bytes: int = 0

    @property
    def typical_seconds(self) -> float:
        """The median step after the first ones, in which torch and the caches settle."""
        return statistics.median(self.seconds[WARM_UP:] or self.seconds)


def measure(steps: int, threads: int, variants: Sequence[str] = VARIANTS) -> dict[str, Record]:
    """Train every variant for `steps` steps, in turns."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", __spec__.name, "--threads", str(threads), "--worker"]
    workers = {
        variant: subprocess.Popen(
            [*command, variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for variant in variants
    }
    records = {variant: Record() for variant in variants}
    try:
        for _ in range(steps):
            for variant, worker in workers.items():
                answer = _ask(worker, "step")
                records[variant].seconds.append(answer["seconds"])
                records[variant].processor_seconds.append(answer["processor_seconds"])
                records[variant].losses.append(answer["loss"])
        for variant, worker in workers.items():
            answer = _ask(worker, "end")
            records[variant].peak_bytes = answer["peak_bytes"]
            records[variant].weight_bytes = answer["weight_bytes"]
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return records


def rows(quick: bool) -> list[Row]:
    """Rows of the kernel benchmark; `quick` takes 4 steps instead of 12."""
    records = measure(4 if quick else 12, torch.get_num_threads())
    plain = records["plain"]
    return [
        Row(
            family="training",
            name=f"LoRA step, SmolLM2-135M, {BATCH} × {LENGTH} tokens, {NAMES[variant]}",
            seconds=records[variant].typical_seconds,
            reference_seconds=plain.typical_seconds,
            reference=NAMES["plain"],
            target=TARGETS[variant],
            extra={
                "tokens/s": round(BATCH * LENGTH / records[variant].typical_seconds),
                "peak memory ratio": round(records[variant].peak_bytes / plain.peak_bytes, 3),
                "weights ratio": round(records[variant].weight_bytes / plain.weight_bytes, 3),
                "largest loss difference": f"{loss_difference(records[variant], plain):.2%}",
            },
        )
        for variant in VARIANTS[1:]
    ]


def loss_difference(record: Record, plain: Record) -> float:
    """The largest relative difference of two loss curves."""
    return max(abs(a / b - 1) for a, b in zip(record.losses, plain.losses, strict=True))


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


def _work(variant: str, threads: int) -> None:
    """One variant's process: a step for every line that comes in."""
    torch.set_num_threads(threads)
    memory = PeakMemory(collect=True)
    model, weight_bytes = _model(variant)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, fused=variant != "plain")
    random = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, model.config.vocab_size + 1)
    for request in sys.stdin:
        if request.strip() == "end":
            peak = memory.read().most
            print(json.dumps({"peak_bytes": peak, "weight_bytes": weight_bytes}), flush=True)
            return
        ids = torch.multinomial(frequencies, BATCH * LENGTH, True, generator=random)
        ids = ids.view(BATCH, LENGTH)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        start, processor_start = time.perf_counter(), time.process_time()
        if variant == "plain":
            loss = model(**batch, use_cache=False).loss
        else:
            answer = fk.causal_loss(model, batch)
            loss = answer.total / answer.labelled
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step = {
            "seconds": time.perf_counter() - start,
            "processor_seconds": time.process_time() - processor_start,
            "loss": float(loss.detach()),
        }
        print(json.dumps(step), flush=True)


def _model(variant: str) -> tuple[Any, int]:
    """The adapted model and the bytes of its base's weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from fedclient.base_model import resolve

    logging.disable_progress_bar()
    folder = resolve("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if variant == "nf4":
        fk.quantize_linears(model, "nf4")
        fk.quantize_embeddings(model)
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        )
    model.train()
    if variant != "plain":
        print(fk.accelerate(model), file=sys.stderr)
    return model, sum(tensors.values())


def _print_table(records: dict[str, Record], steps: int) -> None:
    plain = records["plain"]
    print(
        f"SmolLM2-135M, {BATCH} × {LENGTH} tokens, LoRA rank {RANK} on all linears, {steps} steps"
    )
    for variant, record in records.items():
        ratios = [a / b for a, b in zip(plain.seconds, record.seconds, strict=True)]
        processor = statistics.median(plain.processor_seconds) / statistics.median(
            record.processor_seconds
        )
        print(
            f"{NAMES[variant]:<44}{BATCH * LENGTH / record.typical_seconds:8.0f} tokens/s"
            f"  {statistics.median(ratios[WARM_UP:] or ratios):5.2f} ×"
            f"  ({processor:.2f} × in processor time)"
            f"  peak {record.peak_bytes / 2**20:6.0f} MiB ({record.peak_bytes / plain.peak_bytes:.2f} ×)"
            f"  weights {record.weight_bytes / 2**20:5.0f} MiB"
            f" ({record.weight_bytes / plain.weight_bytes:.2f} ×)"
            f"  losses within {loss_difference(record, plain):.2%}"
            f"  last {record.losses[-1]:.4f}"
        )


def main() -> None:
    """Measure and print, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.worker, arguments.threads)
    else:
        variants = arguments.variants.split(",")
        _print_table(measure(arguments.steps, arguments.threads, variants), arguments.steps)


if __name__ == "__main__":
    main()
