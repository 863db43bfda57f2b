"""What is imported is declared, and a device installs nothing of the server's."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from simulations.benchmarks.faults.catalogue import CATALOGUE
from simulations.benchmarks.fresh_install import NOT_A_DEVICES

ROOT = Path(__file__).parents[2]
ROOMS = ("aggregators", "fedclient", "fededge", "fedhost", "fedkernels", "fedserver", "simulations")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(*extras: str) -> list[Requirement]:
    """What an installation with these extras asks for by itself."""
    found = list(PROJECT["dependencies"])
    for extra in extras:
        found += PROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in found]


def imported(folder: Path) -> Iterator[tuple[str, Path]]:
    """Modules of other projects (their first names), and the files that import them."""
    for file in folder.rglob("*.py"):
        if "benchmarks" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names: Sequence[str] = ()
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                first = name.partition(".")[0]
                if first not in sys.stdlib_module_names and first not in ROOMS:
                    yield first, file


def closure(requirements: Sequence[Requirement]) -> set[str]:
    """The names of all that comes with these, as far as it is installed here."""
    seen, open_ = set(), list(requirements)
    while open_:
        one = open_.pop()
        key = canonicalize_name(one.name), frozenset(one.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            theirs = map(Requirement, metadata.requires(one.name) or [])
        except metadata.PackageNotFoundError:
            continue
        given = [{"extra": extra} for extra in ("", *one.extras)]
        open_ += [
            r for r in theirs if r.marker is None or any(map(r.marker.evaluate, given))
        ]  # fmt: skip
    return {name for name, _ in seen}


@pytest.mark.parametrize(
    ("room", "extras"),
    [
        ("aggregators", ()),
        ("fedclient", ("client",)),
        ("fededge", ("client",)),
        ("fedhost", ("client",)),
        ("fedhost", ("server",)),
        ("fedserver", ("server", "telemetry")),
        ("kernels/fedkernels", ("gpu",)),
        ("simulations", ("client", "server", "sim", "gpu", "telemetry", "tensorboard")),
    ],
)
def test_what_a_room_imports_is_declared(room: str, extras: tuple[str, ...]) -> None:
    names = {canonicalize_name(one.name) for one in declared(*extras)}
    if "sim" in extras:
        names.add("ray")  # flwr[simulation]
    of = metadata.packages_distributions()
    missing = {
        f"{module}: {file.relative_to(ROOT)}"
        for module, file in imported(ROOT / room)
        if names.isdisjoint(map(canonicalize_name, of.get(module, [module])))
    }
    assert not missing


def test_exact_versions_are_known_of_all_that_is_declared() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    known = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    extras = set(PROJECT["optional-dependencies"]) - {"cross"}
    names = {canonicalize_name(one.name) for one in declared(*extras)} - {"fedbraid"}
    assert names <= known


def test_a_device_installs_nothing_of_the_servers() -> None:
    device = closure(declared("client"))
    apart = {canonicalize_name(name) for name in NOT_A_DEVICES}
    assert not apart & device
    servers = declared("server", "telemetry", "tensorboard")
    assert {canonicalize_name(one.name) for one in servers} - device <= apart


def test_only_a_full_disk_may_stop_a_run() -> None:
    assert all(fault.allows(0) for fault in CATALOGUE)
    assert [fault.name for fault in CATALOGUE if fault.allows(1)] == ["server-disk-full"]
