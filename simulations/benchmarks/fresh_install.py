"""The commands of docs/deployment.md as they are printed, in a clean virtual environment.

    python -m simulations.benchmarks.fresh_install

A copy of the sources, a tiny model, a mixed run of five rounds: the ledger's head must be the
simulation's. Then a second environment with a device's packages alone takes over one of the devices. The
packages come from wherever pip is told to look, at the versions of constraints.txt.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedhost.ports import LOOPBACK, accepts
from simulations.benchmarks.tables import table_console
from simulations.loopback import REPOSITORY
from simulations.tiny_model import write_mixed_scenario

PAGE = REPOSITORY / "docs" / "deployment.md"
HEADING = "ten commands"
PORT = 8443
ROUNDS = 5
# What only a server or a simulation needs. Flower itself brings a web server to every SuperNode.
NOT_A_DEVICES = (
    "Authlib", "dp-accounting", "joserfc", "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry-sdk", "prometheus-client", "ray", "tensorboard",
)  # fmt: skip
HEAD = re.compile(r"(?:ledger head|^head:) ([0-9a-f]{64})", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """One command and how it went. ``code``: its exit code."""

    command: str
    code: int
    seconds: float
    output: str


def documented_commands(page: str) -> list[str]:
    """The commands of the page's first block under its heading, in order, without their numbers."""
    block = page.partition(HEADING)[2].partition("```\n")[2].partition("```")[0]
    found = re.findall(r"^(.+?)\s+# (\d+)$", block, flags=re.MULTILINE)
    if [int(number) for _, number in found] != list(range(1, len(block.splitlines()) + 1)):
        raise ValueError(f"the commands under {HEADING!r} are not numbered one by one")
    return [command for command, _ in found]


def run_in_one_shell(
    commands: Sequence[str], folder: Path, environment: dict[str, str]
) -> list[Step]:
    """Run commands one after another in one shell, as a person would, until one fails."""
    shell = subprocess.Popen(
        ["bash", "--norc", "-s"], cwd=folder, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert shell.stdin is not None
    assert shell.stdout is not None
    steps = []
    for command in commands:
        began, lines = time.monotonic(), []
        # What runs in the background must not keep the shell's output open.
        shell.stdin.write(f"{command}\nprintf '\\n:%d:\\n' $?\n")
        shell.stdin.flush()
        while not (ended := re.match(r"^:(\d+):$", line := shell.stdout.readline())) and line:
            lines.append(line)
        code = int(ended[1]) if ended else 1
        steps.append(Step(command, code, time.monotonic() - began, "".join(lines).strip()))
        if code != 0:
            break
    shell.stdin.close()
    shell.wait()
    shell.stdout.close()
    return steps


def _sources(target: Path) -> None:
    """A copy of the repository without what builds and runs have left in it."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "site")
    shutil.copytree(REPOSITORY, target, ignore=ignored)


def main(
    device: Annotated[
        bool, typer.Option(help="Also install a device's packages alone, and let it take part.")
    ] = True,
) -> None:
    """Print what each command did."""
    if accepts(PORT):
        sys.exit(
            f"error: something listens on {LOOPBACK}:{PORT}, where the documented server would"
        )
    console, progress = table_console(), Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="fedbraid-") as name:
        folder, own = Path(name) / "sources", Path(name)
        _sources(folder)
        scenario = write_mixed_scenario(own / "scenario", "fresh", ("clinic", "phone"), ROUNDS)
        constraints = str(folder / "constraints.txt")
        environment = {
            **{key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"},
            "PIP_CONSTRAINT": constraints,
            "PIP_BUILD_CONSTRAINT": constraints,
            "FEDBRAID_CACHE": str(own / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        commands = [
            command.replace("SCENARIO", str(scenario)).replace("NAME", "fresh")
            for command in documented_commands(PAGE.read_text(encoding="utf-8"))
        ]
        extra = [f"fedbraid simulate {scenario} --output {own}/simulated"]
        if device:
            missing = " ".join(NOT_A_DEVICES)
            extra += [
                "fedbraid client stop --folder clinic && python3 -m venv device",
                "device/bin/pip install '.[client]'",
                f"! device/bin/pip show {missing}",
                "device/bin/fedbraid client run --background --folder clinic",
                f"fedbraid server run srv {scenario} --output {own}/second",
            ]
        down = [
            "fedbraid client stop --folder clinic; fedbraid client stop --folder phone;"
            " fedbraid server down srv"
        ]
        progress.print(f"{len(commands)} documented commands, then {len(extra)} checks")
        steps = run_in_one_shell([*commands, *extra], folder, environment)
        run_in_one_shell([". env/bin/activate", *down], folder, environment)
        good = _tell(console, steps, len(commands), len(extra)) == 2 + device
    raise typer.Exit(0 if good else 1)


def _tell(console: Console, steps: list[Step], documented: int, checks: int) -> int:
    """Print the table; how many runs there were if all went well and ended alike, else 0."""
    table = Table("command", "s", "", title="docs/deployment.md, as printed")
    for step in steps:
        table.add_row(
            escape(step.command), f"{step.seconds:.0f}", "worked" if step.code == 0 else "FAILED"
        )
    console.print(table)
    heads = [found[1] for step in steps if (found := HEAD.search(step.output))]
    good = len(steps) == documented + checks and len(set(heads)) == 1
    console.print(f"{documented} commands; ledger heads: {', '.join(h[:16] for h in heads)}")
    if not good:
        console.print(steps[-1].output[-3000:], markup=False)
    return len(heads) if good else 0


if __name__ == "__main__":
    typer.run(main)
