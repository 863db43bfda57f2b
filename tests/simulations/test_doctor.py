"""The doctor names every problem with data and a remedy, and its exit code is the worst of them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from simulations import machine as machine_module
from simulations.doctor import EXIT_CODES, Finding, diagnose, exit_code, main, render
from simulations.machine import (
    Machine,
    Package,
    Place,
    inspect_machine,
    packages,
    place,
    processors,
)

GIGABYTE = 10**9
HEALTHY = Machine(
    python="3.12.1",
    python_wanted=">=3.11",
    packages=(
        Package("torch", ">=2.9", "", "2.13.0", True),
        Package("peft", "", "client", "1", True),
    ),
    processors=4,
    processor_quota=None,
    torch_threads=4,
    wait_policy="passive",
    memory_total=16 * GIGABYTE,
    memory_free=12 * GIGABYTE,
    cache=Place(Path("cache"), 50 * GIGABYTE, True),
    output=Place(Path("runs"), 50 * GIGABYTE, True),
    model="smollm2",
    model_cached=True,
    pip=True,
    kernels=("reference", "portable"),
    kernels_error="",
    compiler="/usr/bin/c++",
    ray_error=None,
    telemetry="0",
    gpus=(),
    gpu_driver=False,
)
PROBLEMS: list[tuple[dict[str, Any], str, str]] = [
    ({"python": "3.10.2"}, "error", "3.10.2"),
    ({"packages": (Package("torch", ">=2.9", "", "2.1", False),)}, "error", "torch 2.1"),
    ({"packages": (Package("peft", ">=1", "client", None, False),)}, "warning", "not installed"),
    ({"packages": ()}, "note", "not known"),
    ({"torch_threads": 8}, "warning", "torch uses 8"),
    ({"processor_quota": 1.5}, "warning", "1.5 processors"),
    ({"torch_threads": None}, "note", "cannot be asked"),
    ({"wait_policy": "active"}, "warning", "active"),
    ({"wait_policy": ""}, "note", "OMP_WAIT_POLICY"),
    ({"memory_free": GIGABYTE}, "error", "1.00 GB free"),
    ({"memory_free": 3 * GIGABYTE}, "warning", "3.00 GB free"),
    ({"memory_free": None}, "note", "cannot be told"),
    ({"cache": Place(Path("c"), 10**12, False)}, "error", "cannot be written"),
    ({"output": Place(Path("o"), 10**6, True)}, "error", "1.00 MB free"),
    ({"output": Place(Path("o"), 5 * 10**8, True)}, "warning", "500 MB free"),
    ({"output": Place(Path("o"), None, True)}, "note", "cannot be told"),
    ({"model_cached": False}, "note", "smollm2"),
    ({"model_cached": False, "pip": False}, "error", "no pip"),
    ({"model_cached": None}, "warning", "cannot be imported"),
    ({"kernels": (), "kernels_error": "ImportError: x"}, "error", "ImportError: x"),
    ({"kernels": ("reference",)}, "warning", "/usr/bin/c++"),
    ({"kernels": ("reference",), "compiler": ""}, "warning", "no C++ compiler"),
    ({"ray_error": "ModuleNotFoundError: ray"}, "note", "ray"),
    ({"telemetry": "1"}, "note", "FLWR_TELEMETRY_ENABLED=1"),
    ({"gpu_driver": True}, "note", "sees no GPU"),
]


def test_a_healthy_machine_has_no_problem() -> None:
    findings = diagnose(HEALTHY)
    assert {finding.severity for finding in findings} == {"ok"}
    assert exit_code(findings) == 0


@pytest.mark.parametrize(("change", "severity", "data"), PROBLEMS)
def test_each_problem_is_found_with_data_and_remedy(
    change: dict[str, Any], severity: str, data: str
) -> None:
    findings = diagnose(replace(HEALTHY, **change))
    found = [finding for finding in findings if finding.severity != "ok"]
    assert [finding.severity for finding in found] == [severity]
    assert data in found[0].data
    assert found[0].remedy or "cannot be" in found[0].data
    assert exit_code(findings) == {"note": 0, "warning": 1, "error": 2}[severity]


@given(st.lists(st.sampled_from([change for change, _, _ in PROBLEMS])))
def test_the_exit_code_is_that_of_the_worst(changes: list[dict[str, Any]]) -> None:
    machine = HEALTHY
    for change in changes:
        machine = replace(machine, **change)
    findings = diagnose(machine)
    assert exit_code(findings) == max(EXIT_CODES[finding.severity] for finding in findings)


def test_a_cache_needs_room_only_while_the_model_is_not_in_it() -> None:
    small = replace(HEALTHY, cache=Place(Path("c"), 10**8, True))
    assert exit_code(diagnose(small)) == 0
    assert exit_code(diagnose(replace(small, model_cached=False))) == 2


def test_every_problem_and_remedy_is_printed() -> None:
    console = Console(file=io.StringIO(), width=200)
    findings = [
        Finding("disk [bold]", "1 MB free", "free some", "error"),
        Finding("GPU", "none", "", "ok"),
    ]
    render(findings, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for words in ("disk [bold]", "1 MB free", "remedy: free some", "GPU", "1 error, 0 warnings"):
        assert words in text


def test_this_machine_can_be_told_as_json(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    code = main(as_json=True, output=tmp_path / "runs", console=console)
    assert isinstance(console.file, io.StringIO)
    found = [json.loads(line) for line in console.file.getvalue().splitlines()]
    assert code == max(EXIT_CODES[finding["severity"]] for finding in found)
    told = {finding["problem"]: finding for finding in found}
    assert told["Python"]["severity"] == "ok"
    assert {"packages", "memory", "cache", "run folders", "base model", "kernels", "GPU"} <= set(
        told
    )
    assert all(set(finding) == {"problem", "data", "remedy", "severity"} for finding in found)


def test_the_packages_that_run_the_tests_are_found() -> None:
    found = {package.name: package for package in packages() if package.extra == ""}
    assert found["torch"].satisfied
    assert found["rich"].installed is not None


def test_a_place_that_is_not_there_yet_is_judged_by_its_parent(tmp_path: Path) -> None:
    found = place(tmp_path / "a" / "b" / "c")
    assert found.writable
    assert found.free is not None
    assert found.free > 0
    assert not (tmp_path / "a").exists()
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    assert not place(file / "below").writable


@pytest.mark.parametrize(
    ("content", "expected"), [("max 100000", None), ("150000 100000", 1.5), ("rubbish", None)]
)
def test_the_quota_of_a_container(tmp_path: Path, content: str, expected: float | None) -> None:
    path = tmp_path / "cpu.max"
    path.write_text(content, encoding="ascii")
    assert machine_module._quota(path) == expected


def test_a_module_that_does_not_import_is_told_why() -> None:
    told = machine_module._import_error("fedbraid_has_no_such_module")
    assert told is not None
    assert "fedbraid_has_no_such_module" in told


def test_inspection_changes_nothing(tmp_path: Path) -> None:
    inspect_machine(tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []
    assert processors() >= 1
