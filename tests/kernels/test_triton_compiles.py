"""Every Triton kernel compiles for real GPUs, down to machine code, and keeps its roundings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_gpu_kernels.py")
# One case of each kernel; without a pattern the script compiles all cases, which takes minutes.
ONE_OF_EACH = "|".join(
    f"(^{name}$)"
    for name in (
        "noise popcount stretch",
        r"perturb gaussian stretch \*i16",
        "replay rademacher stretch int32",
        "replay popcount scattered int64",
        "project rademacher stretch",
        "signs",
        "noise rank1",
        "perturb rank1",
        "replay rank1 1",
        "project rank1",
        "sign stream",
        "sign transpose",
        r"sign product \*bf16 many rows",
        r"dequantize nf4 \*i16",
        r"product nf4 \*bf16 forward 1",
        r"product int4 \*bf16 backward 40",
    )
)


@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), ONE_OF_EACH, capability],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(ran.stdout.splitlines()) == 16
