"""How a deployed server bears many nodes.

    python -m simulations.benchmarks.load --nodes 50,200

Starts a real server (nginx, SuperLink, SuperExec, gatekeeper) on loopback for each number of nodes,
enrols as many fake ones, and lets them take part in a run: every request is one that a SuperNode makes,
signed and over TLS, and every update passes the gate; only the training is missing. Fleet and server
share this machine's processors. Ends with 1 if a node's update did not count.
"""

from __future__ import annotations

import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.table import Table

from aggregators.gate import GateContext, admit
from aggregators.keys import public_hex
from aggregators.messages import Plan
from fedhost.enrolment import JoinRequest, Token, fingerprint_of
from fedhost.node_signature import public_pem
from fedhost.supervision import status_of
from fedserver.deployment.flower_control import FlowerControl
from fedserver.deployment.registry import Registry
from fedserver.ledger import Ledger
from simulations.benchmarks.edge.server import Server, running_server
from simulations.benchmarks.load.fleet import LAYOUT, FakeNode, Fleet, Traffic
from simulations.benchmarks.tables import table_console

MEGABYTE = 1 << 20
SCENARIO = """
name = "load"
preset = "fedkseed"
base_model = "none"
rounds = {rounds}
threads = 1
evaluate = false
deadline_seconds = 1800.0

[zeroth_order]
pool_size = 4096
local_steps = 64
"""


@dataclass
class Use:
    """CPU seconds of the server's processes by name, and their largest resident sets in bytes."""

    seconds: dict[str, float] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)


class Watch:
    """Looks at the server's processes every half second."""

    def __init__(self, server: Server) -> None:
        told = status_of(server.folder.path)
        assert told is not None
        self._roots = {n: psutil.Process(c["pid"]) for n, c in told["children"].items()}
        self._spent: dict[int, tuple[str, float]] = {}
        self.use = Use()
        self._stopped = threading.Event()
        self._look()
        self._before = self._totals()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> Use:
        """What was used since the beginning."""
        self._stopped.set()
        self._thread.join()
        self._look()
        totals = self._totals()
        self.use.seconds = {n: s - self._before.get(n, 0.0) for n, s in totals.items()}
        return self.use

    def _run(self) -> None:
        while not self._stopped.wait(0.5):
            self._look()

    def _look(self) -> None:
        for name, root in self._roots.items():
            resident = 0
            try:
                for process in [root, *root.children(recursive=True)]:
                    times = process.cpu_times()
                    self._spent[process.pid] = (name, times.user + times.system)
                    resident += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            self.use.resident[name] = max(resident, self.use.resident.get(name, 0))

    def _totals(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, seconds in self._spent.values():
            found[name] = found.get(name, 0.0) + seconds
        return found


@dataclass(frozen=True)
class Result:
    """One run. Seconds are medians over its rounds; ``gate`` is of one reply."""

    nodes: int
    rounds: int
    phases: dict[str, float]
    gate: float
    accepted: int
    ledger_bytes: int
    blob_bytes: int
    traffic: Traffic
    use: Use
    failures: list[str]


def main(
    nodes: Annotated[str, typer.Option(help="Numbers of nodes.")] = "50,200",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    connections: Annotated[int, typer.Option(help="Connections of the fleet at once.")] = 16,
) -> None:
    """Print what a round of so many nodes costs the server."""
    results = [_measure(int(count), rounds, connections) for count in nodes.split(",")]
    table = Table("", *(f"{one.nodes} nodes" for one in results))
    for label, value in ROWS.items():
        table.add_row(label, *(value(one) for one in results))
    table_console().print(table)
    for one in results:
        for failure in sorted(set(one.failures))[:3]:
            print(f"{one.nodes} nodes: {failure}", file=sys.stderr)
    raise typer.Exit(0 if all(one.accepted == one.nodes * one.rounds for one in results) else 1)


def _requests(one: Result) -> int:
    return sum(one.traffic.requests.values())


ROWS: dict[str, Callable[[Result], str]] = {
    "updates that counted": lambda one: f"{one.accepted} of {one.nodes * one.rounds}",
    "round, seconds": lambda one: f"{sum(one.phases.values()):.1f}",
    "  of these plan": lambda one: f"{one.phases['plan']:.2f}",
    "  ask and gate": lambda one: f"{one.phases['train']:.1f}",
    "  aggregate": lambda one: f"{one.phases['aggregate']:.2f}",
    "  commit": lambda one: f"{one.phases['commit']:.2f}",
    "gate, ms a reply": lambda one: f"{1000 * one.gate:.2f}",
    "Fleet requests a node and round": lambda one: f"{_requests(one) / one.nodes / one.rounds:.1f}",
    "  of these looking for messages": lambda one: (
        f"{one.traffic.requests['pull-messages'] / one.nodes / one.rounds:.1f}"
    ),
    "  answered 'busy'": lambda one: f"{one.traffic.busy / one.nodes / one.rounds:.2f}",
    **{
        f"{name}, CPU ms a Fleet request": lambda one, name=name: (  # type: ignore[misc]
            f"{1000 * one.use.seconds.get(name, 0.0) / _requests(one):.2f}"
        )
        for name in ("superlink", "nginx", "gatekeeper")
    },
    "SuperLink, CPU s a node and round": lambda one: (
        f"{one.use.seconds['superlink'] / one.nodes / one.rounds:.3f}"
    ),
    "coordinator, CPU s a node and round": lambda one: (
        f"{one.use.seconds['superexec'] / one.nodes / one.rounds:.3f}"
    ),
    "bytes to a node and round": lambda one: f"{one.traffic.received // one.nodes // one.rounds:,}",
    "bytes from a node and round": lambda one: f"{one.traffic.sent // one.nodes // one.rounds:,}",
    "ledger, bytes a node and round": lambda one: (
        f"{one.ledger_bytes // one.nodes // one.rounds:,}"
    ),
    "updates kept, bytes a node and round": lambda one: (
        f"{one.blob_bytes // one.nodes // one.rounds:,}"
    ),
    "SuperLink, MB resident": lambda one: f"{one.use.resident['superlink'] / MEGABYTE:.0f}",
    "coordinator, MB resident": lambda one: f"{one.use.resident['superexec'] / MEGABYTE:.0f}",
}


def _measure(count: int, rounds: int, connections: int) -> Result:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with running_server(folder / "server") as server:
            fleet = Fleet(server, _enrolled(server, count), connections)
            fleet.start()
            scenario = folder / "load.toml"
            entries = "".join(f'\n[[nodes]]\nname = "n{place}"\n' for place in range(count))
            scenario.write_text(SCENARIO.format(rounds=rounds) + entries)
            fleet.traffic = Traffic()
            watch = Watch(server)
            done = subprocess.run(
                [sys.executable, "-m", "simulations.command", "server", "run",
                 str(server.folder.path), str(scenario)],
                capture_output=True, text=True,
            )  # fmt: skip
            use = watch.end()
            traffic = fleet.traffic
            fleet.stop()
            if done.returncode != 0:
                log = (server.folder.path / "logs" / "superexec.log").read_text()[-2000:]
                raise RuntimeError(done.stderr + log)
            run = server.folder.path / "runs" / "load"
            accepted, gate = _judge_again(run)
            return Result(
                count, rounds, _phases(run), gate, accepted, (run / "ledger.db").stat().st_size,
                sum(file.stat().st_size for file in (run / "blobs").rglob("*") if file.is_file()),
                traffic, use, fleet.failures,
            )  # fmt: skip


def _enrolled(server: Server, count: int) -> list[FakeNode]:
    """Nodes in the registry as if they had joined: how that goes is measured elsewhere."""
    registry = Registry(server.folder.registry)
    fingerprint = fingerprint_of(server.folder.identity(server.settings).authority.read_bytes())
    nodes = []
    for place in range(count):
        node = FakeNode(
            f"n{place}", ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()
        )
        token = Token.new(fingerprint)
        registry.invite(node.name, token, time.time() + 60.0)
        request = JoinRequest(
            secret=token.secret.hex(),
            transport_key=public_pem(node.transport),
            update_key=public_hex(node.signing),
            transport_signature=secrets.token_hex(64),
            update_signature=secrets.token_hex(64),
        )
        registry.redeem(request, time.time())
        nodes.append(node)
    control = FlowerControl(
        server.folder.ports().superlink, server.folder.loopback_identity.authority
    )
    control.follow(registry)
    registry.close()
    return nodes


def _phases(run: Path) -> dict[str, float]:
    """Median seconds of each phase of a round, from the run's events."""
    spent: dict[str, list[float]] = {}
    current, since = "", 0.0
    for line in (run / "events.jsonl").read_text().splitlines():
        event: dict[str, Any] = json.loads(line)
        ends = event["event"] == "round_committed"
        if event["event"] == "phase_started" or ends:
            if current:
                spent.setdefault(current, []).append(event["time"] - since)
            current, since = ("" if ends else event["phase"]), event["time"]
    return {phase: statistics.median(times) for phase, times in spent.items()}


def _judge_again(run: Path) -> tuple[int, float]:
    """How many updates were accepted, and the seconds that the gate takes for one."""
    ledger = Ledger(run)
    accepted, times = 0, []
    try:
        for entry in ledger.entries("round"):
            for row in entry.content["nodes"]:
                if row["verdict"] != "accepted":
                    continue
                accepted += 1
                payload = ledger.get(row["update"])
                context = GateContext(LAYOUT, Plan.model_validate(row["plan"]))
                started = time.perf_counter()
                admit(payload, context)
                times.append(time.perf_counter() - started)
    finally:
        ledger.close()
    return accepted, statistics.median(times) if times else 0.0


if __name__ == "__main__":
    typer.run(main)
