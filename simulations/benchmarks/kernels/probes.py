"""Steps along probes, K-seed replay and projection, against noise that torch draws and stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import fedkernels as fk
from simulations.benchmarks.kernels.row import Row
from simulations.benchmarks.kernels.timing import median_seconds

TENSOR_ID = 3
CYCLES = 1000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORT_DTYPES = ("bf16", "fp16")

# The bars, by probe: of one step, of replay and of projection.
PERTURB_BARS = {"rademacher": "≤ 1.3 × the floor, ≥ 25 ×"}
REPLAY_BARS = {
    "rademacher": "≤ 0.04 ns a weight, seed and core; ≥ 200 ×",
    "popcount": "≥ 15 ×",
    "gaussian": "≥ 8 ×",
}
PROJECT_BARS = {"rademacher": "≤ 0.08 ns a weight, seed and core; error ≤ 1e-6"}

# Probes of bits take a tenth of the others' time, so they are measured over more seeds.
MANY_SEEDS, SOME_SEEDS = 256, 16

# 64 MiB in fp32: a layer of a large model. `torch.normal` gets that much anew from the system for
# every seed, and the kernels need no such memory; noise for a smaller tensor takes half the time.
SIZE = 4096


def rows(quick: bool) -> list[Row]:
    """Measure all on matrices that no cache holds, rebuilds and cycles on small ones.

    The reference is what a program without kernels does (MeZO, Malladi et al., 2023): it draws
    `torch.normal` for each tensor and seed, then adds it or takes the inner product. It does K seeds
    in K times what it does one in; one is measured. Both sides use torch's present threads.
    """
    repeats = 3 if quick else 9
    return [
        *_perturb_rows(SIZE if quick else 2 * SIZE, repeats),
        *_replay_rows(repeats),
        *_project_rows(repeats),
        *(_rebuild_row(name, repeats) for name in SHORT_DTYPES),
        *(_cycles_row(name) for name in DTYPES),
    ]


@dataclass
class _Steps:
    """Counts seeds up, so that no call repeats another's work."""

    next_seed: int = 0

    def __call__(self) -> int:
        self.next_seed += 1
        return self.next_seed


def _perturb_rows(size: int, repeats: int) -> list[Row]:
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    step = _Steps()

    def perturb(probe: str) -> Callable[[], object]:
        return lambda: fk.perturb_(weight, step(), 1e-3, TENSOR_ID, probe)

    def reference() -> None:
        weight.add_(torch.normal(0, 1, size=weight.shape), alpha=1e-3)

    floor, *taken = median_seconds(
        lambda: weight.add_(1e-3), *map(perturb, fk.PROBES), repeats=repeats
    )
    # a call of seconds, which is measured over fewer repeats
    [expected] = median_seconds(reference, repeats=3)
    return [
        Row(
            family="probes",
            name=f"perturb {probe}, {size}², fp32",
            seconds=seconds,
            reference_seconds=expected,
            reference="torch.normal, add_",
            floor_seconds=floor,
            floor="read-modify-write",
            target=PERTURB_BARS.get(probe, ""),
            extra={"time / floor": seconds / floor, **_per_seed(seconds, weight, 1)},
        )
        for probe, seconds in zip(fk.PROBES, taken, strict=True)
    ]


def _replay_rows(repeats: int) -> list[Row]:
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    found = []
    for probe in fk.PROBES:
        seeds, coefficients = _many(probe)

        def ours(
            probe: str = probe, s: torch.Tensor = seeds, c: torch.Tensor = coefficients
        ) -> None:
            fk.replay_(weight, s, c, -30, TENSOR_ID, probe)

        def one_seed() -> None:
            weight.add_(torch.normal(0, 1, size=weight.shape), alpha=1e-9)

        seconds, reference = median_seconds(ours, one_seed, repeats=repeats)
        found.append(
            Row(
                family="probes",
                name=f"replay {probe}, {SIZE}², K {len(seeds)}, fp32",
                seconds=seconds,
                reference_seconds=reference * len(seeds),
                reference="K × (torch.normal, add_)",
                target=REPLAY_BARS.get(probe, ""),
                extra=_per_seed(seconds, weight, len(seeds)),
            )
        )
    return found


def _project_rows(repeats: int) -> list[Row]:
    delta = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    found = []
    for probe in fk.PROBES:
        seeds, _ = _many(probe)

        def ours(probe: str = probe, s: torch.Tensor = seeds) -> torch.Tensor:
            return fk.project(delta, s, TENSOR_ID, probe)

        def one_seed() -> torch.Tensor:
            return delta.flatten() @ torch.normal(0, 1, size=(delta.numel(),))

        seconds, reference = median_seconds(ours, one_seed, repeats=repeats)
        checked = seeds[:8]
        exact = torch.stack(
            [
                (delta.double() * fk.noise(seed, TENSOR_ID, delta.shape, probe).double()).sum()
                for seed in checked.tolist()
            ]
        )
        error = (fk.project(delta, checked, TENSOR_ID, probe) - exact).norm() / exact.norm()
        found.append(
            Row(
                family="probes",
                name=f"project {probe}, {SIZE}², K {len(seeds)}, fp32",
                seconds=seconds,
                reference_seconds=reference * len(seeds),
                reference="K × (torch.normal, inner product)",
                target=PROJECT_BARS.get(probe, ""),
                extra={
                    **_per_seed(seconds, delta, len(seeds)),
                    "relative error against fp64": error.item(),
                },
            )
        )
    return found


def _rebuild_row(name: str, repeats: int) -> Row:
    """Rebuild a narrow weight from seeds: its error against that of rounding the exact sum once."""
    dtype = DTYPES[name]
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    seeds, coefficients = _many("rademacher")
    exact = weight.double()
    stepwise = weight.clone()
    for seed, coefficient in zip(seeds.tolist(), coefficients.tolist(), strict=True):
        z = fk.noise(seed, TENSOR_ID, weight.shape)
        exact += coefficient * 2.0**-30 * z.double()
        stepwise.add_(z.to(dtype), alpha=coefficient * 2.0**-30)
    rebuilt = fk.replay_(weight.clone(), seeds, coefficients, -30, TENSOR_ID)
    ideal = (exact.to(dtype).double() - exact).norm()
    errors = [((w.double() - exact).norm() / ideal).item() for w in (rebuilt, stepwise)]
    [seconds] = median_seconds(
        lambda: fk.replay_(weight.clone(), seeds, coefficients, -30, TENSOR_ID), repeats=repeats
    )
    return Row(
        family="probes",
        name=f"rebuild 512², K {len(seeds)}, {name}",
        seconds=seconds,
        target="error ≤ 1.05 × one rounding's",
        extra={
            "error / one rounding's": errors[0],
            "K times add_: error / one rounding's": errors[1],
        },
    )


def _cycles_row(name: str) -> Row:
    """Perturb a weight into scratch again and again: what is left of it afterwards."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).to(DTYPES[name])
    before, scratch = weight.clone(), torch.empty_like(weight)
    step = _Steps()

    def cycles() -> None:
        for cycle in range(CYCLES):
            scale = 1e-3 if cycle % 2 else -1e-3
            fk.perturbed(weight, step(), scale, TENSOR_ID, out=scratch)

    [seconds] = median_seconds(cycles, repeats=1)
    width = torch.int32 if weight.element_size() == 4 else torch.int16
    changed = (weight.view(width) ^ before.view(width)).count_nonzero().item()
    return Row(
        family="probes",
        name=f"{CYCLES} perturb/restore cycles, 256², {name}",
        seconds=seconds,
        target="0 bits changed",
        extra={"weights changed": float(changed)},
    )


def _many(probe: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return seeds and coefficients, int64 and int32 [K]; their sum fits 32 bits, as is usual."""
    count = MANY_SEEDS if probe in ("rademacher", "rank1") else SOME_SEEDS
    generator = torch.Generator().manual_seed(2)
    seeds = torch.randint(2**62, (count,), generator=generator)
    coefficients = torch.randint(-(2**16), 2**16, (count,), generator=generator)
    return seeds, coefficients.int()


def _per_seed(seconds: float, weight: torch.Tensor, seeds: int) -> dict[str, float | str]:
    core_nanoseconds = 1e9 * seconds * torch.get_num_threads()
    return {"ns a weight, seed and core": core_nanoseconds / (weight.numel() * seeds)}
