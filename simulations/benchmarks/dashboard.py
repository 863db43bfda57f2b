"""What the dashboard costs: first paint over many runs and nodes, delay of events, memory, and rounds.

python -m simulations.benchmarks.dashboard [--runs 1000] [--nodes 10000] [--viewers 200] [--rounds 0]

A real dashboard process serves folders that ledger and metrics have written; requests and viewers are
real connections over loopback. ``--rounds N`` also runs N rounds of six nodes with a tiny model and one
thread, half of them with all viewers on its page, in the order without, with, with, without: a machine
that gets slower meets both alike. The run and the dashboard's server have one priority, the viewers are
another process of the lowest one: on two cores they have what the server leaves of the second. Beside
the ratio of the medians is that of rounds without viewers among themselves, which no viewer explains.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from fedserver import events, metrics
from fedserver.configuration import RunConfiguration, load, parse
from fedserver.dashboard.accounts import VIEWER, Accounts
from fedserver.ledger import Ledger
from fedserver.live_log import EVENTS, LiveLog
from simulations.benchmarks.viewers import view, viewers

ROUNDS, SMALL_ROUNDS = 3, 2
PAINTS = (
    "/",
    "/runs/big",
    "/runs/big/rounds",
    "/runs/big/fleet",
    "/runs/big/plan",
    "/runs/big/privacy",
    "/runs/big/robustness",
    "/runs/big/rounds/2",
    "/runs/big/ledger",
)
SERVING = "processor time of the dashboard's server"
CHANGES = 40
SECONDS_BETWEEN_CHANGES = 0.5


def main(arguments: list[str] | None = None) -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--viewers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="of a node in each of these rounds")
    asked = parser.parse_args(arguments)
    table = Table("what", "measured", "at most")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_runs(root, asked.runs, asked.nodes)
        with served(root) as (address, token, process):
            for path in PAINTS:
                wall, busy = paint(address + path, token, process)
                shown = f"{1000 * wall:.0f} ms, {1000 * busy:.0f} ms"
                table.add_row(f"{path}: first request, processor time", shown, "300 ms")
            delays = asyncio.run(watched(root / "big", address, token, asked.viewers))
            place = max(0, round(0.99 * len(delays)) - 1)
            table.add_row(
                f"event delay, {asked.viewers} viewers, {CHANGES} changes: median, p99",
                f"{statistics.median(delays):.3f} s, {sorted(delays)[place]:.3f} s",
                "1 s",
            )
            resident = process.memory_info().rss
            table.add_row("memory of the server", f"{resident / 1e6:.0f} MB", "200 MB")
    if asked.rounds:
        times = rounds_with_and_without(asked.rounds, asked.viewers, asked.steps)
        for kind, (alone, seen) in times.items():
            medians = statistics.median(alone), statistics.median(seen)
            if kind == SERVING:
                shown = f"{medians[0]:.2f} s, {medians[1]:.2f} s"
                table.add_row(f"{kind} a round: alone, with {asked.viewers} viewers", shown, "")
                continue
            table.add_row(
                f"{kind} of a round: alone, with {asked.viewers} viewers, ratio",
                f"{medians[0]:.2f} s, {medians[1]:.2f} s, {medians[1] / medians[0]:.3f}",
                "1.03",
            )
            halves = statistics.median(alone[1::2]) / statistics.median(alone[::2])
            table.add_row(f"{kind} of a round: alone against alone", f"{halves:.3f}", "")
    Console().print(table)


def make_runs(root: Path, runs: int, nodes: int) -> None:
    """``runs`` finished runs of two nodes and, as "big", one of ``nodes`` that is under way."""
    small = parse({"nodes": [{"name": "clinic"}, {"name": "school"}], "rounds": SMALL_ROUNDS})
    write_run(root / "run-0000", small, SMALL_ROUNDS, finished=True)
    for number in range(1, runs - 1):
        shutil.copytree(root / "run-0000", root / f"run-{number:04d}")
    big = parse({"name": "big", "nodes": [{"name": f"node-{n:05d}"} for n in range(nodes)]})
    write_run(root / "big", big, ROUNDS, finished=False)


def write_run(
    folder: Path, configuration: RunConfiguration, rounds: int, *, finished: bool
) -> None:
    """A run folder as a coordinator leaves it, with made-up numbers."""
    ledger = Ledger(folder, create=True)
    log = LiveLog(folder, lambda event: None)
    names = [node.name for node in configuration.nodes]
    log(
        events.RunStarted(
            configuration.name,
            configuration.preset,
            rounds if finished else rounds + 1,
            1,
            tuple(events.NodeInfo(n, "rank 8", 100, 10, "phone", "cpu", 2, 8 << 30) for n in names),
            configuration.base_model,
            str(folder),
        )
    )
    ledger.append("genesis", 0, {"configuration": configuration.identity()}, {"started": 0.0})
    for number in range(1, rounds + 1):
        log(events.RoundStarted(number))
        rows = [_node(name, number) for name in names]
        content = {
            "quorum": True, "mixing": {}, "entering": None, "entering_by_format": {}, "nodes": rows,
            "state": "0" * 64, "carry_rank": 8, "view_rank": 8, "seeds": 0, "tail_energy": 0.0,
        }  # fmt: skip
        wall = {
            "started": 1e9 + number,
            "seconds": 60.0,
            "nodes": dict.fromkeys(names, 30.0),
            "memory": {},
        }
        head = ledger.append("round", number, content, wall).hash
        count = len(names)
        log(
            events.RoundCommitted(
                number, 2.0, count, 0, 1000 * count, 2000 * count, 60.0, 8, 0.0, head
            )
        )
    metrics.write(ledger, configuration, folder / "metrics.jsonl")
    ledger.close()
    if finished:
        log(events.RoundsEnded("finished"))
        metrics.write_json(
            {
                "name": folder.name,
                "rounds": rounds,
                "head": head,
                "bytes_up": 1000 * count * rounds,
                "bytes_down": 2000 * count * rounds,
                "seconds": 60.0 * rounds,
            },
            folder / "summary.json",
        )
        return
    log(events.RoundStarted(rounds + 1))
    log(events.PhaseStarted(rounds + 1, "train", len(names), len(names) // 2, 3600.0))
    for name in names[: len(names) // 2]:
        log(_reply(rounds + 1, name))


def _node(name: str, number: int) -> dict[str, Any]:
    return {
        "node": name, "round": number, "sends": "rank 8", "verdict": "accepted", "reason": "",
        "base_format": "full", "choice": "",
        "plan": {
            "action": "train", "local_steps": 10, "batch_size": 8, "learning_rate": 1e-3, "seed": 7,
            "nonce": "0" * 32, "run": "0" * 32, "dtype": "float32", "deadline_seconds": 3600.0,
            "layout": "0" * 64, "base_digest": "0" * 64, "base_model": "model", "preset": "braid",
            "method": {"family": "low_rank", "rank": 8, "target_modules": ["all-linear"]},
        },
        "bytes_up": 1000, "bytes_down": 2000, "update": "0" * 64, "share": 1e-4, "memory_bytes": 10**9,
        "family": "low_rank", "norm": 1.5,
        "report": {"examples": 100, "train_loss": 2.0, "train_loss_first": 2.5, "evaluation": None},
    }  # fmt: skip


def _reply(number: int, name: str) -> events.NodeReplied:
    return events.NodeReplied(number, name, "accepted", "", "rank 8", 2.5, 2.0, 1000, 2000, 30.0)


@contextmanager
def served(root: Path) -> Iterator[tuple[str, str, psutil.Process]]:
    """A dashboard process: its address, a viewer's token, and the process."""
    token = Accounts(root).issue_token("benchmark", VIEWER)
    process = subprocess.Popen(
        [sys.executable, "-m", "simulations.command", "dashboard", str(root), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://[^/]+", process.stdout.readline())
        assert found is not None
        yield found.group(0), token, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def paint(address: str, token: str, server: psutil.Process) -> tuple[float, float]:
    """Seconds of the first request of a page, and those that the server's process worked meanwhile."""
    headers = {"Authorization": f"Bearer {token}", "Accept": "text/html"}
    before, started = sum(server.cpu_times()[:2]), time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
        answer.read()
    return time.perf_counter() - started, sum(server.cpu_times()[:2]) - before


async def watched(folder: Path, address: str, token: str, viewers: int) -> list[float]:
    """Seconds from a line in the log to every viewer's receipt of what it changed."""
    arrived: list[list[float]] = [[] for _ in range(viewers)]
    ready = [asyncio.Event() for _ in range(viewers)]
    tasks = [
        asyncio.create_task(view(address, f"/runs/{folder.name}/stream?live=1", token, box, event))
        for box, event in zip(arrived, ready, strict=True)
    ]
    await asyncio.gather(*(event.wait() for event in ready))
    written: list[float] = []
    log = folder / EVENTS
    for number in range(CHANGES):
        await asyncio.sleep(SECONDS_BETWEEN_CHANGES)
        event = events.to_json(_reply(ROUNDS + 1, f"node-{9000 + number:05d}"))
        with log.open("a") as file:
            file.write(json.dumps({"time": time.time(), **event}) + "\n")
        written.append(time.time())
    await asyncio.sleep(2)
    for task in tasks:
        task.cancel()
    delays = []
    for box in arrived:
        for moment in written:
            after = [seen - moment for seen in box if seen >= moment]
            delays.append(min(after) if after else 60.0)
    return delays


def rounds_with_and_without(
    rounds: int, viewers_count: int, steps: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds, processor seconds, and those of the dashboard's server, of the rounds without viewers and
    of those with; of one run.
    """
    from simulations.engines import run_local
    from simulations.tiny_model import write_scenario

    # The first rounds also load and compile; four of them keep the order of the others.
    first = 4
    total = first + rounds
    changes = ["evaluate=false", f"local_steps={steps}", "micro_batch_size=8"]
    seconds: dict[int, float] = {}
    worked: dict[int, float] = {}
    serving: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "runs"
        root.mkdir()
        configuration = load(str(write_scenario(Path(scratch) / "tiny", total, 6)), changes)
        with (
            served(root) as (address, token, server),
            viewers(address, "/runs/run/stream?live=1", token, viewers_count) as watching,
        ):

            def listen(event: events.Event) -> None:
                # The round's own clock starts after RoundStarted and stops before RoundCommitted.
                if isinstance(event, events.RoundStarted):
                    if _with_viewers(event.round):
                        watching.turn("on")
                    worked[event.round] = -time.process_time()
                    serving[event.round] = -sum(server.cpu_times()[:2])
                elif isinstance(event, events.RoundCommitted):
                    worked[event.round] += time.process_time()
                    serving[event.round] += sum(server.cpu_times()[:2])
                    seconds[event.round] = event.seconds
                    if _with_viewers(event.round):
                        watching.turn("off")

            run_local(configuration, root / "run", listen)
    found = {}
    kinds = {"time": seconds, "processor time": worked, SERVING: serving}
    for kind, times in kinds.items():
        counted = {number: taken for number, taken in times.items() if number > first}
        alone = [taken for number, taken in counted.items() if not _with_viewers(number)]
        found[kind] = (alone, [t for number, t in counted.items() if _with_viewers(number)])
    return found


def _with_viewers(number: int) -> bool:
    """Rounds 2 and 3 of every four: without, with, with, without."""
    return number % 4 in (2, 3)


if __name__ == "__main__":
    main()
