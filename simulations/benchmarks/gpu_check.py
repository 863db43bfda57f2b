"""Check and time the Triton kernels on the GPU of this machine: `make gpu-check`.

    python -m simulations.benchmarks.gpu_check               on a CUDA machine
    python -m simulations.benchmarks.gpu_check --interpret   correctness alone, without a GPU

Exits with 1 if a kernel is wrong. Without a GPU nothing is measured, and that is no error.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import shutil
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from simulations.benchmarks.tables import table_console

GPU_SIZE, INTERPRETED_SIZE = 1000, 40


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--interpret", action="store_true", help="check correctness in Triton's interpreter"
    )
    if parser.parse_args().interpret:
        # Triton reads this when it is imported, hence before anything that imports it.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if importlib.util.find_spec("triton") is None:
        print("gpu-check: Triton is not installed here; nothing was measured.")
        return 0
    console = table_console()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("gpu-check: Triton's interpreter, correctness alone; nothing was measured.")
        return _check(console, torch.device("cpu"), INTERPRETED_SIZE)
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA GPU here; nothing was measured. --interpret checks correctness.")
        return 0
    console.print(_machine(torch.cuda.get_device_name()))
    status = _check(console, torch.device("cuda"), GPU_SIZE)
    _time(console)
    return status


def _check(console: Console, device: object, size: int) -> int:
    import torch

    from simulations.benchmarks.gpu.correctness import checks

    assert isinstance(device, torch.device)
    results = list(checks(device, size))
    wrong = [check for check in results if not check.passed]
    console.print(f"{len(results) - len(wrong)} of {len(results)} comparisons with the CPU agree")
    for check in wrong:
        console.print(f"WRONG  {check.name}: {check.detail}")
    return 1 if wrong else 0


def _time(console: Console) -> None:
    from simulations.benchmarks.gpu.timings import measure_ceilings, timings
    from simulations.benchmarks.kernels.table import duration

    ceilings = measure_ceilings()
    table = Table(
        title=f"ceilings measured in this run: copy {ceilings.bandwidth / 1e9:.0f} GB/s, "
        f"bfloat16 matmul {ceilings.flops / 1e12:.1f} TFLOP/s"
    )
    for column in ("kernel", "time", "GB/s", "of copy", "TFLOP/s", "of matmul", "against"):
        table.add_column(column, justify="left" if column in ("kernel", "against") else "right")
    for timing in timings():
        bandwidth, flops = timing.moved / timing.seconds, timing.operations / timing.seconds
        against = (f"{name} {t / timing.seconds:.2f} ×" for name, t in timing.references.items())
        table.add_row(
            timing.name,
            duration(timing.seconds),
            f"{bandwidth / 1e9:.0f}",
            f"{bandwidth / ceilings.bandwidth:.0%}",
            f"{flops / 1e12:.2f}" if flops else "",
            f"{flops / ceilings.flops:.0%}" if flops else "",
            ", ".join(against),
        )
    console.print(table)


def _machine(part: str) -> str:
    """Return the GPU, its driver, the versions that matter, and the moment."""
    import torch
    import triton

    driver = "unknown"
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        driver = lines[0].strip() if lines else driver
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}"
    return f"{part}, driver {driver}, {versions}, {now}"


if __name__ == "__main__":
    sys.exit(main())
