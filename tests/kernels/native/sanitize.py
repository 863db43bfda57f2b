"""The kernels' tests against an extension that checks its memory accesses and its arithmetic.

    python tests/kernels/native/sanitize.py [arguments of pytest]

builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer (GCC or Clang, on Linux)
in build/sanitize and runs tests/kernels with it, after ThreadSanitizer has watched the thread pool
in a program of its own. The first report ends the run, which then fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "sanitize"
# Loaded before Python, which is not built with them; exceptions are intercepted in the last one.
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")


def main(arguments: list[str]) -> int:
    """Build, run the tests and return their exit status."""
    compiler = os.environ.get("CXX", "c++")
    if status := _check_threads(compiler):
        return status
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(_runtime(compiler, name) for name in RUNTIMES),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep much until the process ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FEDKERNELS_EXTENSION": str(_build()),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    tests = arguments or [str(ROOT / "tests" / "kernels")]
    # Reports go to standard error; pytest's capture would lose that of a process that dies.
    pytest = [sys.executable, "-m", "pytest", "-p", "chosen_extension", "--capture=sys", "-q"]
    return subprocess.run([*pytest, *tests], env=environment, cwd=ROOT).returncode


def _runtime(compiler: str, name: str) -> str:
    command = [compiler, f"-print-file-name={name}"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(found).is_file():
        sys.exit(f"sanitize: {compiler} has no {name}; install GCC's sanitizers")
    return found


def _check_threads(compiler: str) -> int:
    """Return the exit status of threads_checks.cc under ThreadSanitizer."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [Path(__file__).with_name("threads_checks.cc")]
    sources.append(ROOT / "kernels" / "fedkernels" / "cpu" / "threads.cc")
    program = BUILD / "threads_checks"
    options = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread"]
    command = [compiler, *options, f"-I{sources[1].parent}", *sources, "-o", program]
    subprocess.run(command, check=True)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], env=environment).returncode


def _build() -> Path:
    """Return the path of the extension that was built."""
    nanobind = subprocess.run(
        [sys.executable, "-m", "nanobind", "--cmake_dir"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    options = [f"-Dnanobind_DIR={nanobind}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure = ["cmake", "-S", ROOT / "kernels", "-B", BUILD, "-DFK_SANITIZE=ON", *options]
    for command in (configure, ["cmake", "--build", BUILD, "--parallel", "2"]):
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            sys.exit(f"{ran.stdout}{ran.stderr}\nsanitize: the build failed")
    return next(BUILD.glob("_cpu*.so"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
