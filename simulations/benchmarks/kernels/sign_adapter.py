"""The sign adapter against the matmuls of its unpacked factors."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fedkernels as fk
from simulations.benchmarks.kernels.row import Row
from simulations.benchmarks.kernels.timing import median_seconds

SIZE = 2048
SEEDS = 1024


def rows(quick: bool) -> list[Row]:
    """Measure 2048 x 2048, K 1024: forward at 1 and 128 rows, forward and backward at 128.

    The dense product is measured in float32 and in bfloat16; the reference is the faster of them,
    whatever the type of the adapter's input.
    """
    coefficients = torch.randn(SEEDS, generator=torch.Generator().manual_seed(1))
    adapter = fk.SignAdapter.from_seeds(range(SEEDS), coefficients, 0, (SIZE, SIZE))
    dense = {
        dtype: [factor.contiguous().to(dtype) for factor in (*adapter.factors(), coefficients)]
        for dtype in (torch.float32, torch.bfloat16)
    }
    unpacked_bytes = sum(factor.nbytes for factor in dense[torch.float32][:2])
    memory = {"adapter / unpacked factors": adapter.nbytes / unpacked_bytes}
    repeats = 9 if quick else 31
    found = []
    for row_count, backward in ((128, False), (1, False), (128, True)):
        x = torch.randn(row_count, SIZE, generator=torch.Generator().manual_seed(2))
        inputs = {dtype: x.to(dtype).requires_grad_(backward) for dtype in dense}
        ours = [_run(adapter, inputs[dtype], backward) for dtype in dense]
        theirs = [_run(_Unpacked(*dense[dtype]), inputs[dtype], backward) for dtype in dense]
        *seconds, dense32, dense16 = median_seconds(*ours, *theirs, repeats=repeats)
        passes = "forward + backward" if backward else "forward"
        for dtype, taken in zip(("fp32", "bf16"), seconds, strict=True):
            found.append(
                Row(
                    family="sign_adapter",
                    name=f"{passes} {SIZE}², K {SEEDS}, {row_count} rows, {dtype}",
                    seconds=taken,
                    reference_seconds=min(dense32, dense16),
                    reference=f"dense, {'fp32' if dense32 < dense16 else 'bf16'}",
                    target="≤ 0.5 × the dense time, ≤ 1/16 of its memory" if row_count > 1 else "",
                    extra={
                        "time / dense fp32": taken / dense32,
                        "time / dense bf16": taken / dense16,
                        **memory,
                    },
                )
            )
    return found


class _Unpacked:
    """The adapter's product in plain torch."""

    def __init__(self, u: torch.Tensor, v: torch.Tensor, coefficients: torch.Tensor) -> None:
        self.u, self.v, self.coefficients = u, v, coefficients

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.v.T * self.coefficients) @ self.u


def _run(layer: fk.SignAdapter | _Unpacked, x: torch.Tensor, backward: bool) -> Callable[[], None]:
    gradient = torch.ones(len(x), SIZE, dtype=x.dtype)

    def run() -> None:
        y = layer(x)
        if backward:
            torch.autograd.backward(y, gradient)
            x.grad = None

    return run
