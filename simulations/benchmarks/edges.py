"""What an edge aggregator saves, and what it costs: bytes up and seconds against the number of devices.

    python -m simulations.benchmarks.edges --devices 10,100,300

Sums canned updates of each family as an edge does, and reads the sum as the root does. The layout is one
block of SmolLM2-135M, which has 30 of them. Checks that the root's mean is that of the devices' updates.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from aggregators import Layout, LowRank, SeedScalars, Sketch, Verdict, aggregate, decode, encode
from aggregators.codec import pack, unpack
from aggregators.cohort import Cohort, CohortMember
from aggregators.cohort_codec import cohort_parts, read_cohort

HIDDEN, MIDDLE, KEYS = 576, 1536, 192
LAYOUT = Layout(
    {
        "q_proj.weight": (HIDDEN, HIDDEN), "k_proj.weight": (KEYS, HIDDEN),
        "v_proj.weight": (KEYS, HIDDEN), "o_proj.weight": (HIDDEN, HIDDEN),
        "gate_proj.weight": (MIDDLE, HIDDEN), "up_proj.weight": (MIDDLE, HIDDEN),
        "down_proj.weight": (HIDDEN, MIDDLE),
    }
)  # fmt: skip
RANK, SKETCH_RANK, OVERSAMPLING, POOL, USED = 8, 4, 4, 4096, 200


def main(
    devices: Annotated[str, typer.Option(help="Numbers of devices behind an edge.")] = "10,100,300",
) -> None:
    """Print what goes up from the devices, and what goes up from their edge."""
    torch.set_num_threads(1)
    table = Table(
        "family", "devices", "bytes of one", "of all", "of their sum", "of it rows",
        "sum, ms a device", "root reads and means it, s", "against the devices'",
    )  # fmt: skip
    for label, make in FAMILIES.items():
        for count in map(int, devices.split(",")):
            table.add_row(label, str(count), *_measured(make, count))
    Console(width=150).print(table)


def _measured(make: Callable[[int], Any], count: int) -> list[str]:
    sent = [encode(make(seed), "bfloat16") for seed in range(count)]
    updates = [(decode(data, LAYOUT), 100 + seed) for seed, data in enumerate(sent)]
    members = [_member(seed, data) for seed, data in enumerate(sent)]
    started = time.perf_counter()
    header, tensors = cohort_parts(Cohort.of(updates, members))
    summed = time.perf_counter() - started
    data = pack(header, tensors)
    rows = len(data) - len(pack({**header, "members": []}, tensors))
    started = time.perf_counter()
    cohort = read_cohort(*unpack(data), LAYOUT)
    (mean,) = aggregate([(cohort, 1.0)], LAYOUT).updates.values()
    read = time.perf_counter() - started
    (expected,) = aggregate(updates, LAYOUT).updates.values()
    return [
        f"{len(sent[0]):,}", f"{sum(map(len, sent)):,}", f"{len(data):,}", f"{rows:,}",
        f"{1000 * summed / count:.2f}", f"{read:.2f}", _difference(mean, expected),
    ]  # fmt: skip


def _difference(found: Any, expected: Any) -> str:
    if encode(found) == encode(expected):
        return "the same bits"
    one, two = found.dense(), expected.dense()
    largest = max(float((one[n] - two[n]).norm() / two[n].norm()) for n in two)
    return f"{largest:.1e}"


def _member(seed: int, data: bytes) -> CohortMember:
    digest = hashlib.sha256(data).hexdigest()
    return CohortMember(
        node=f"device-{seed}", verdict=Verdict.ACCEPTED, examples=100 + seed, bytes_up=len(data),
        bytes_down=len(data), norm=1.0, train_loss=1.0, envelope=digest, payload=digest, key=digest,
        signature=2 * digest,
    )  # fmt: skip


def _numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _low_rank(seed: int) -> LowRank:
    return LowRank(
        LAYOUT,
        {
            spec.name: (
                _numbers(seed, spec.shape[0], RANK),
                _numbers(-seed, RANK, spec.shape[1]),
                1e-3,
            )
            for spec in LAYOUT
        },
    )


def _seed_scalars(seed: int) -> SeedScalars:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(POOL, generator=generator)[:USED].sort().values
    return SeedScalars(LAYOUT, 1, POOL, indices, _numbers(seed, USED) * 1e-4)


def _sketch(seed: int) -> Sketch:
    views = {
        spec.name: (
            _numbers(seed, spec.shape[0], SKETCH_RANK),
            _numbers(seed + 1, spec.shape[1], SKETCH_RANK + OVERSAMPLING),
        )
        for spec in LAYOUT
    }
    return Sketch(LAYOUT, "b" * 64, views)


FAMILIES: dict[str, Callable[[int], Any]] = {
    f"LoRA, rank {RANK}": _low_rank,
    f"scalars, {USED} of {POOL} seeds": _seed_scalars,
    f"sketch, rank {SKETCH_RANK}": _sketch,
}

if __name__ == "__main__":
    typer.run(main)
