"""``/metrics`` for Prometheus: what the runs of a folder are doing, from the same files as the pages.

Of a run that is under way every scrape reads its small files. One that has ended keeps its last values
as long as it is listed; they are read once, so that a thousand finished runs cost lines and no reading.
What is of the present, the phase, the nodes of the round and waiting requests, ends with the run.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fedserver.control import ControlQueue
from fedserver.dashboard.library import Library
from fedserver.dashboard.round_views import PHASES, totals
from fedserver.dashboard.run_files import Row
from fedserver.dashboard.run_reader import RunReader
from fedserver.dashboard.standings import arrivals, counts
from fedserver.live_log import ALIVE, WAITING

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTERS = {
    "rounds_committed": ("Rounds in the ledger.",),
    "rounds_without_quorum": ("Rounds in the ledger that counted nothing.",),
    "bytes": ("Bytes of the run so far.", "direction"),
    "updates": ("Accepted updates of committed rounds by family.", "family"),
    "replies": (
        "Verdicts of committed rounds, one a reply; missing: a question without a reply when its round"
        " closed. A reply that comes later counts in the round in which it comes, as late or, where the"
        " scenario lets it in, as accepted.",
        "verdict",
    ),
}
GAUGES = {
    "rounds_planned": ("Rounds of the scenario.",),
    "phase": ("1 for the phase that the round is in.", "phase"),
    "nodes": ("Nodes of the current round by status.", "status"),
    "loss": (
        "Nats per token. train: mean of the last committed round; eval: newest known, of the model of"
        " the last round that was evaluated.",
        "kind",
    ),
    "round_seconds": ("Duration of the last committed round.",),
    "epsilon": ("Privacy budget spent, where it is accounted.",),
    "operator_requests": ("Requests of operators that wait for a round to end.",),
    "carry_rank": ("Rank of the running low-rank sum.",),
}
"""Names of a run's metrics: what they are, and their labels beside the run's name."""
Sample = tuple[str, tuple[str, ...], float]
"""Metric, values of its labels, value."""


class Exposition(Collector):
    """The metrics of a library; of runs that have ended their samples are kept."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._viewers = 0
        self._lock = threading.Lock()
        self._ended: dict[str, tuple[float, list[Sample]]] = {}

    def text(self, viewers: int) -> bytes:
        """What Prometheus reads, with so many open event streams."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        registry.register(self)
        with self._lock:
            self._viewers = viewers
            return generate_latest(registry)

    def describe(self) -> list[Metric]:
        """Nothing: what there is, the runs say."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families of metrics."""
        rows = self._library.rows()
        states = GaugeMetricFamily("fedbraid_runs", "Runs by state.", labels=["state"])
        for state, count in sorted(Counter(row["state"] for row in rows).items()):
            states.add_metric([state], count)
        yield states
        yield GaugeMetricFamily(
            "fedbraid_dashboard_viewers", "Open event streams.", value=self._viewers
        )
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for kind, described in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for name, (text, *labels) in described.items():
                families[name] = kind(f"fedbraid_run_{name}", text, labels=["run", *labels])
        for row in rows:
            for name, values, value in self._samples(row):
                families[name].add_metric([row["run"], *values], value)
        self._ended = {
            row["run"]: self._ended[row["run"]] for row in rows if row["run"] in self._ended
        }
        yield from families.values()

    def _samples(self, row: Row) -> list[Sample]:
        name, alive = row["run"], row["state"] in ALIVE
        held = self._ended.get(name)
        if held is not None and not alive and held[0] == row["changed"]:
            return held[1]
        run = self._library.reader(name)
        if run is None:
            return []
        found = [*_of_rounds(run, row), *(_of_now(run) if alive else ())]
        if alive:
            self._ended.pop(name, None)
        else:
            self._ended[name] = (row["changed"], found)
        return found


def _of_rounds(run: RunReader, row: Row) -> Iterator[Sample]:
    """What was committed so far."""
    rounds, sums = run.rounds(), totals(run)
    yield "rounds_committed", (), len(rounds)
    yield "rounds_without_quorum", (), sum(not one.get("quorum", True) for one in rounds)
    yield "rounds_planned", (), row["rounds"] or 0
    for direction in ("up", "down"):
        yield "bytes", (direction,), sums[f"bytes_{direction}"]
    families: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    for one in rounds:
        families.update(one.get("families") or {})
        verdicts.update(one.get("verdicts") or {})
    for family, count in sorted(families.items()):
        yield "updates", (family,), count
    for verdict, count in sorted(verdicts.items()):
        yield "replies", (verdict,), count
    last = rounds[-1] if rounds else {}
    known: tuple[tuple[str, tuple[str, ...], Any], ...] = (
        ("loss", ("train",), sums["loss"]),
        ("loss", ("eval",), sums["eval_loss"]),
        ("epsilon", (), sums["epsilon"]),
        ("round_seconds", (), last.get("seconds")),
        ("carry_rank", (), last.get("carry_rank")),
    )
    yield from ((name, labels, value) for name, labels, value in known if value is not None)


def _of_now(run: RunReader) -> Iterator[Sample]:
    """What the run is doing."""
    phase = run.live().get("phase")
    for one in (*PHASES, "evaluate", *WAITING):
        yield "phase", (one,), float(phase == one)
    for status, count in sorted(counts(arrivals(run)).items()):
        yield "nodes", (status,), count
    yield "operator_requests", (), len(ControlQueue(run.folder).pending())
