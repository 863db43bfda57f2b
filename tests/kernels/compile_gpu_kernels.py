"""Compile every Triton kernel for two generations of NVIDIA GPUs; run by test_triton_compiles.py.

A process of its own: where Triton interprets, it does not compile. No GPU is needed for it, as the
assembler comes with Triton. Prints a line for each kernel, with the registers that it spills.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedkernels.gpu import probes, quantized, rank1, sign_adapter
from fedkernels.gpu.placement import placement
from fedkernels.part import Part

Case = tuple[str, Any, dict[str, str], dict[str, Any]]

# Argument types by name; a kernel's other arguments are pointers and constants of the case.
SCALARS = {
    **dict.fromkeys(("seed", "tensor_id", "first_block", "count", "held", "width", "lead"), "i64"),
    **dict.fromkeys(("stream", "out_padded", "size", "factor_bits"), "i64"),
    **dict.fromkeys(("skip", "seeds_count", "groups", "out_groups"), "i32"),
    **dict.fromkeys(("inner", "columns", "out_features", "in_features"), "i32"),
    **dict.fromkeys(("unit", "step"), "fp32"),
    "seeds": "*i64",
    "coefficients": "*i32",
    "partials": "*fp64",
    "row_signs": "*i8",
    "column_signs": "*i8",
    "digits": "*i8",
}


def elementwise() -> Iterator[Case]:
    pruned = Part((64, 64), rows=range(9))
    for probe in ("rademacher", "popcount", "gaussian"):
        for part, rows in ((Part((1 << 20,)), None), (pruned, "*i64")):
            count = 1 << 20 if rows is None else 9 * 64
            constants = placement(part, count, probe, torch.device("cpu")).constants
            where = {"rows": rows, "columns": rows} if rows else {}
            name = f"{probe} {'scattered' if rows else 'stretch'}"
            sums = [tl.float64] if probe == "gaussian" else [tl.int32, tl.int64]
            yield f"noise {name}", probes.noise_kernel, {"out": "*fp32"} | where, constants
            yield f"project {name}", probes.project_kernel, {"delta": "*fp32"} | where, constants
            for kind in ("*fp32", "*i16", "*fp16"):
                weight = {"weight": kind, "out": kind} | where
                yield f"perturb {name} {kind}", probes.perturb_kernel, weight, constants
            for kind in sums:
                yield (
                    f"replay {name} {kind}",
                    probes.replay_kernel,
                    {"weight": "*i16"} | where,
                    constants | {"SUM": kind},
                )


def matrices() -> Iterator[Case]:
    tile = {"ROWS": rank1.ROWS, "COLUMNS": rank1.COLUMNS}
    indices = {"rows": "i64"}
    yield "signs", rank1.signs_kernel, {"out": "*i8", "indices": "*i64"}, {"TILE": 1024}
    yield "noise rank1", rank1.noise_kernel, {"out": "*fp32"} | indices, tile
    yield "perturb rank1", rank1.perturb_kernel, {"weight": "*i16", "out": "*i16"} | indices, tile
    for digits in (1, 5):
        constants = tile | {"SEEDS": rank1.SEEDS, "DIGITS": digits}
        yield (
            f"replay rank1 {digits}",
            rank1.replay_kernel,
            {"weight": "*fp32"} | indices,
            constants,
        )
    project = tile | {"SEEDS": rank1.PROJECTED_SEEDS}
    yield "project rank1", rank1.project_kernel, {"delta": "*fp32"} | indices, project


def sign_adapters() -> Iterator[Case]:
    words = {"words": "*i32", "padded": "i64"}
    yield "sign stream", sign_adapter.stream_kernel, words, {"GROUPS": sign_adapter.GROUPS}
    yield "sign transpose", sign_adapter.transpose_kernel, words | {"out": "*i32"}, {}
    shape = {"rows": "i32", "columns": "i32", "padded": "i32", "scale": "*fp32"}
    for kind, coarse in (("*fp32", False), ("*bf16", True)):
        for few in (False, True):
            tile = sign_adapter.tile(1 if few else 1000)
            types = words | shape | dict.fromkeys(("x", "add", "out"), kind)
            name = f"sign product {kind} {'few' if few else 'many'} rows"
            yield name, sign_adapter.product_kernel, types, tile | {"COARSE": coarse}


def quantized_matrices() -> Iterator[Case]:
    nested = {"scales": "*u8", "nested_code": "*fp32", "nested_offset": "*fp32"}
    formats = {
        "nf4": {"codes": "*u8", "table": "*fp32", "nested_scales": "*fp32"} | nested,
        "int4": {"codes": "*u8", "table": "*fp32", "scales": "*fp16", "minimums": "*fp16"},
        "int8": {"codes": "*i8", "scales": "*fp32"},
    }
    for name, parts in formats.items():
        blocks = {"BLOCK": 0 if name == "int8" else 64, "NESTED_BLOCK": 256}
        for kind in ("*fp32", "*i16", "*fp16"):
            out = {"out": kind}
            constants = {"TILE": quantized.TILE} | blocks | {"BLOCK": 64}
            yield f"dequantize {name} {kind}", quantized.dequantize_kernel, parts | out, constants
        for kind, coarse in (("*fp32", False), ("*bf16", True)):
            for backward in (False, True):
                for rows in (1, 40):
                    types = parts | {"rows": "i32"} | dict.fromkeys(("x", "out", "bias"), kind)
                    constants = (
                        {"COARSE": coarse, "BACKWARD": backward} | quantized.tile(rows) | blocks
                    )
                    label = f"product {name} {kind} {'backward' if backward else 'forward'} {rows}"
                    yield label, quantized.product_kernel, types, constants


def compile_case(case: Case, capability: int) -> tuple[int, int]:
    """Compile and assemble one kernel; return its registers and the bytes of stack that it spills."""
    _, kernel, types, constants = case
    kinds = SCALARS | types
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    absent = {
        n: None for n, kind in signature.items() if kind == "constexpr" and n not in constants
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants | absent)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    # The law of a replayed weight rounds the product before the sum; no kernel flushes subnormals.
    assert "fma.rn.f64" not in compiled.asm["ptx"], case[0]
    assert ".ftz" not in compiled.asm["ptx"], case[0]
    return resources(compiled.asm["cubin"])


def resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


def all_cases() -> Iterator[Case]:
    yield from elementwise()
    yield from matrices()
    yield from sign_adapters()
    yield from quantized_matrices()


if __name__ == "__main__":
    wanted, *capabilities = sys.argv[1:]
    for capability in map(int, capabilities):
        for case in (case for case in all_cases() if re.search(wanted, case[0])):
            registers, spilled = compile_case(case, capability)
            print(f"sm_{capability} {case[0]}: {registers} registers, {spilled} bytes spilled")
