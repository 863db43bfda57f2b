"""What the dashboard costs: first paint over many runs and nodes, delay of events, memory, and rounds.

python -m simulations.benchmarks.dashboard [--runs 1000] [--nodes 10000] [--viewers 200] [--rounds 0]

A real dashboard process serves folders that ledger and metrics have written; requests and viewers are
real connections over loopback. ``--rounds N`` also runs a tiny model for N rounds (rounded up to blocks
of eight), some of them with all viewers on its page, and compares neighbouring rounds: how is told in
``viewed_rounds.py``. Of 192 rounds the interval is of 48 pairs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from fedserver import events, metrics
from fedserver.configuration import RunConfiguration, parse
from fedserver.dashboard.accounts import VIEWER, Accounts
from fedserver.ledger import Ledger
from fedserver.live_log import EVENTS, LiveLog
from simulations.benchmarks.dashboard_process import dashboard_process
from simulations.benchmarks.tables import table_console
from simulations.benchmarks.viewed_rounds import measure
from simulations.benchmarks.viewers import view

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
CHANGES = 40
SECONDS_BETWEEN_CHANGES = 0.5


def main(arguments: list[str] | None = None) -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--viewers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="of a node in each of these rounds")
    asked = parser.parse_args(arguments)
    table = Table("what", "measured", "at most")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_runs(root, asked.runs, asked.nodes)
        token = Accounts(root).issue_token("benchmark", VIEWER)
        with dashboard_process(root) as (link, process):
            address = link.partition("/login")[0]
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
        found = measure(asked.rounds, asked.viewers, asked.steps)
        against = f"{asked.viewers} viewers against none, median ratio (95 % interval)"
        for kind, ratio, control in (
            ("time of a round", found.time, found.time_control),
            ("processor time of the run a round", found.work, found.work_control),
        ):
            table.add_row(f"{kind}: {against}", str(ratio), "1.03")
            table.add_row(f"{kind}: none against none", str(control), "")
        shown = "{:.2f} s, {:.2f} s".format(*found.serving)
        table.add_row("processor time of the dashboard a round: none, viewers", shown, "")
        table.caption = (
            "The run has one processor, the dashboard and the viewers have the others."
            if found.pinned
            else "Run, dashboard and viewers share one processor."
        )
    table_console().print(table)


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


if __name__ == "__main__":
    main()
