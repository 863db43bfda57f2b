"""Quantised linears: against bitsandbytes where it is installed, dense torch, and reading the codes.

bitsandbytes brings an OpenMP runtime of its own beside torch's. Where the threads of both wait by
turning and other programs want the processors too, its times grow many-fold; `make` sets
OMP_WAIT_POLICY=passive, with which it shows what it can do. Say which of the two a figure is from.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional

import fedkernels as fk
from fedkernels.reference import quantized as reference
from simulations.benchmarks.kernels.row import Row
from simulations.benchmarks.kernels.timing import Call, least_seconds

SIZE = 2048
RANK = 8

# Copies that calls take in turn, so that none finds its weights in a cache: 86 MB of nf4.
COPIES = 40

BITSANDBYTES = "bitsandbytes"
NOT_INSTALLED = "bitsandbytes is not installed: pip install --no-deps bitsandbytes"


def rows(quick: bool) -> list[Row]:
    """Measure on a square matrix of 2048²; quick means fewer repeats and no more than 128 rows."""
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    repeats = 3 if quick else 9
    return [
        *_conversions(weight, repeats),
        *_few_rows(weight, (1, 8) if quick else (1, 4, 8), repeats),
        *_many_rows(weight, (128,) if quick else (128, 512, 2048), repeats),
        _adapter(weight, 128, repeats),
    ]


def _conversions(weight: Tensor, repeats: int) -> list[Row]:
    found = []
    for fmt in ("nf4", "int4", "int8"):
        tensor = fk.quantize(weight, fmt)
        quantize, quantize_plain, dequantize, dequantize_plain, copy = least_seconds(
            partial(fk.quantize, weight, fmt),
            partial(reference.quantize, weight, fmt),
            tensor.dequantize,
            partial(reference.dequantize, tensor),
            weight.clone,
            repeats=repeats,
        )
        bits: dict[str, float | str] = {"bits a weight": 8 * tensor.nbytes / weight.numel()}
        for name, seconds, plain in (
            ("quantize", quantize, quantize_plain),
            ("dequantize", dequantize, dequantize_plain),
        ):
            found.append(
                Row(
                    family="quantized",
                    name=f"{name} {fmt}, {SIZE}², fp32",
                    seconds=seconds,
                    reference_seconds=plain,
                    reference="torch",
                    floor_seconds=copy,
                    floor="copy of the fp32 weights",
                    extra=bits,
                )
            )
    return found


def _few_rows(weight: Tensor, sizes: tuple[int, ...], repeats: int) -> list[Row]:
    """Products whose weights come from memory, not from a cache: what decoding a token meets."""
    tensor = fk.quantize(weight, "nf4")
    copies = [tensor] + [fk.quantize(weight, "nf4") for _ in range(COPIES - 1)]
    theirs = _bitsandbytes(weight)
    found = []
    for count in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(count, SIZE).to(dtype)
            read, ours = least_seconds(
                partial(_next, cycle(copies), lambda tensor: tensor.codes.view(torch.int64).sum()),
                partial(_next, cycle(copies), partial(fk.linear, x)),
                repeats=repeats * COPIES,
            )
            exact = reference.linear(x.double(), tensor)
            found.append(
                Row(
                    family="quantized",
                    name=f"nf4 linear, {count} rows, {SIZE}², {_short(dtype)}",
                    seconds=ours,
                    reference_seconds=theirs and _seconds(partial(theirs, x), repeats),
                    reference=BITSANDBYTES if theirs else NOT_INSTALLED,
                    floor_seconds=read,
                    floor="read the codes once (sum)",
                    target="≥ 20 × bitsandbytes; ≤ 3 × the floor",
                    extra={"relative error": _error(fk.linear(x, tensor), exact)},
                )
            )
    return found


def _many_rows(weight: Tensor, sizes: tuple[int, ...], repeats: int) -> list[Row]:
    tensor = fk.quantize(weight, "nf4")
    theirs = _bitsandbytes(weight)
    dense_weight = weight.bfloat16()
    found = []
    for count in sizes:
        x = torch.randn(count, SIZE).bfloat16().requires_grad_()
        dy = torch.randn(count, SIZE).bfloat16()
        x32, dy32 = x.detach().float().requires_grad_(), dy.float()
        ours, dense, dense32 = least_seconds(
            _step(partial(fk.linear, x, tensor), x, dy),
            _step(partial(functional.linear, x, dense_weight), x, dy),
            _step(partial(functional.linear, x32, weight), x32, dy32),
            repeats=repeats,
        )
        name = f"nf4 linear forward + backward, {count} rows, {SIZE}², bf16"
        found.append(
            Row(
                family="quantized",
                name=name,
                seconds=ours,
                reference_seconds=min(dense, dense32),
                reference=f"dense torch in {'bf16' if dense < dense32 else 'fp32'}",
                target=f"time ≤ {1.3 if count < 512 else 1.1} × dense",
                extra={"time / dense": ours / min(dense, dense32)},
            )
        )
        if count == 128:
            call = theirs and _step(partial(theirs, x), x, dy)
            found.append(
                Row(
                    family="quantized",
                    name=name,
                    seconds=ours,
                    reference_seconds=call and _seconds(call, repeats),
                    reference=BITSANDBYTES if call else NOT_INSTALLED,
                    target="≥ 5 × bitsandbytes",
                )
            )
    return found


def _adapter(weight: Tensor, count: int, repeats: int) -> Row:
    tensor = fk.quantize(weight, "nf4")
    dense = weight.bfloat16()
    x = torch.randn(count, SIZE).bfloat16().requires_grad_()
    dy = torch.randn(count, SIZE).bfloat16()
    a = torch.randn(RANK, SIZE).bfloat16().requires_grad_()
    b = torch.randn(SIZE, RANK).bfloat16().requires_grad_()

    def plain() -> Tensor:
        return functional.linear(x, dense) + 2.0 * functional.linear(functional.linear(x, a), b)

    ours, torchs = least_seconds(
        _step(partial(fk.lora_linear, x, tensor, a, b, 2.0), x, dy),
        _step(plain, x, dy),
        repeats=repeats,
    )
    return Row(
        family="quantized",
        name=f"nf4 lora_linear forward + backward, r {RANK}, {count} rows, {SIZE}², bf16",
        seconds=ours,
        reference_seconds=torchs,
        reference="dense bf16 layer and adapter in torch",
        target="≥ 1 ×",
    )


def _step(forward: Callable[[], Tensor], x: Tensor, dy: Tensor) -> Call:
    """Return a call that computes a product and its gradients, and forgets them."""

    def call() -> None:
        torch.autograd.backward(forward(), dy)
        x.grad = None

    return call


def _bitsandbytes(weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return its product with the weight in NF4 with nested scales; None where it is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    bnb = importlib.import_module("bitsandbytes")
    packed, state = bnb.functional.quantize_4bit(
        weight.bfloat16(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )

    def product(x: Tensor) -> Tensor:
        y: Tensor = bnb.matmul_4bit(x, packed.t(), quant_state=state)
        return y

    return product


def _next(
    tensors: Iterator[fk.QuantizedTensor], use: Callable[[fk.QuantizedTensor], object]
) -> None:
    use(next(tensors))


def _seconds(call: Call, repeats: int) -> float:
    [seconds] = least_seconds(call, repeats=repeats)
    return seconds


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def _short(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "bf16"


if __name__ == "__main__":
    for row in rows(quick=False):
        ratio = "" if row.ratio is None else f"  {row.ratio:.2f} × {row.reference}"
        floor = (
            "" if row.floor_seconds is None else f"  {row.seconds / row.floor_seconds:.2f} floors"
        )
        print(
            f"{row.name:66s} {row.seconds * 1e3:9.3f} ms{ratio}{floor}  {row.target}  {row.extra}"
        )
