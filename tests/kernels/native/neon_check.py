"""The kernels for 64-bit ARM give the bits of this machine's: cross-built, run under qemu-user.

    python tests/kernels/native/neon_check.py

builds the same program (main.cc) for both processors and compares what every instruction set prints.
It exits with 1 where a line differs and with 2, saying what to install, where a tool is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[3] / "kernels"
CROSS = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
STATIC = "-DCMAKE_EXE_LINKER_FLAGS=-static"  # so that qemu needs no ARM libraries


class MissingTool(Exception):
    """A program that this check needs is not installed."""


def main() -> int:
    """Build, run and compare; return the exit status."""
    try:
        emulator = _tool("apt install qemu-user", "qemu-aarch64", "qemu-aarch64-static")
        cmake = _tool("apt install cmake, or pip install 'fedbraid[cross]'", "cmake")
        cross_compiler = _cross_compiler()
    except MissingTool as error:
        print(f"neon-check: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="neon-check-") as folder:
        here = _build(cmake, Path(folder) / "here", {}, [])
        there = _build(cmake, Path(folder) / "arm", {"CXX": cross_compiler}, [*CROSS, STATIC])
        results = {f"here, {name}": lines for name, lines in _checksums([str(here)]).items()}
        for name, lines in _checksums([emulator, str(there)]).items():
            results[f"ARM, {name}"] = lines
    return _compare(results)


def _tool(advice: str, *names: str) -> str:
    """Return the path of the first program that is there, on the path or beside this Python."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name in names:
        found = shutil.which(name, path=places)
        if found:
            return found
    raise MissingTool(f"{names[0]} is missing: {advice}")


def _cross_compiler() -> str:
    """Return a C++ compiler for 64-bit ARM, with its arguments: GCC, or else the one in Zig."""
    if importlib.util.find_spec("ziglang") is None:
        return _tool(
            "apt install g++-aarch64-linux-gnu, or pip install 'fedbraid[cross]'",
            "aarch64-linux-gnu-g++",
        )
    gcc = shutil.which("aarch64-linux-gnu-g++")
    return gcc or f"{sys.executable} -m ziglang c++ -target aarch64-linux-musl"


def _build(
    cmake: str, folder: Path, environment: Mapping[str, str], options: Sequence[str]
) -> Path:
    configure = [cmake, "-S", SOURCE, "-B", folder, "-DFK_CHECKSUMS=ON", *options]
    for command in (configure, [cmake, "--build", folder, "--parallel", "2"]):
        ran = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True
        )
        if ran.returncode:
            sys.exit(f"{ran.stdout}{ran.stderr}\nneon-check: the build failed")
    return folder / "checksums"


def _checksums(program: Sequence[str]) -> dict[str, list[str]]:
    """Return the lines that the program prints for each instruction set that it has."""

    def lines(*arguments: str) -> list[str]:
        command = [*program, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split(
            "\n"
        )[:-1]

    return {name: lines(name) for name in lines()}


def _compare(results: Mapping[str, Sequence[str]]) -> int:
    """Print one line an instruction set; return 1 if one differs from the first, or NEON is absent."""
    first, expected = next(iter(results.items()))
    failed = "ARM, neon" not in results or not expected
    for name, lines in results.items():
        different = [ours for ours, line in zip(expected, lines, strict=True) if ours != line]
        failed |= bool(different)
        verdict = f"{len(different)} differ from {first}: {different[:5]}" if different else "equal"
        print(f"{name:16} {len(lines)} checksums, {verdict}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
