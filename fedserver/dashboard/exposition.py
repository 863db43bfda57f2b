"""``/metrics`` for Prometheus: what the runs of a folder are doing, from the same files as the pages.

A scrape describes every run from its small files; rounds, bytes and updates by verdict and family are
given for runs that are under way, so that a thousand finished ones cost nothing.
"""

from __future__ import annotations

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

from fedserver.control import ControlQueue
from fedserver.dashboard.library import Library
from fedserver.dashboard.round_views import PHASES, totals
from fedserver.dashboard.run_reader import Row, RunReader
from fedserver.dashboard.standings import arrivals, counts
from fedserver.live_log import ALIVE, WAITING

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class RunCollector:
    """Reads the library at every scrape; keeps no numbers of its own."""

    def __init__(self, library: Library, viewers: int) -> None:
        self._library = library
        self._viewers = viewers

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
        alive = [row for row in rows if row["state"] in ALIVE]
        readers = [(row, self._library.reader(row["run"])) for row in alive]
        yield from _of_runs([(row, run) for row, run in readers if run is not None])


def exposition(library: Library, viewers: int) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    registry.register(RunCollector(library, viewers))
    return generate_latest(registry)


def _of_runs(runs: list[tuple[Row, RunReader]]) -> Iterator[Metric]:
    def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"fedbraid_run_{name}", text, labels=["run", *labels])

    def counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"fedbraid_run_{name}", text, labels=["run", *labels])

    committed = counter("rounds_committed", "Rounds in the ledger.")
    missed = counter("rounds_without_quorum", "Rounds in the ledger that counted nothing.")
    planned = gauge("rounds_planned", "Rounds of the scenario.")
    phase = gauge("phase", "1 for the phase that the round is in.", "phase")
    nodes = gauge("nodes", "Nodes of the current round by status.", "status")
    moved = counter("bytes", "Bytes of committed rounds.", "direction")
    updates = counter("updates", "Accepted updates of committed rounds by family.", "family")
    verdicts = counter("replies", "Replies of committed rounds.", "verdict")
    loss = gauge("loss", "Nats per token of the last committed round.", "kind")
    seconds = gauge("round_seconds", "Duration of the last committed round.")
    epsilon = gauge("epsilon", "Privacy budget spent, where it is accounted.")
    queue = gauge("operator_requests", "Requests of operators that wait for a round to end.")
    carry = gauge("carry_rank", "Rank of the running low-rank sum.")
    for row, run in runs:
        name, rounds, sums, told = row["run"], run.rounds(), totals(run), run.live()
        committed.add_metric([name], len(rounds))
        short = [one for one in rounds if not one.get("quorum", True)]
        missed.add_metric([name], len(short))
        planned.add_metric([name], row["rounds"] or 0)
        for one in (*PHASES, "evaluate", *WAITING):
            phase.add_metric([name, one], float(told.get("phase") == one))
        for status, count in sorted(counts(arrivals(run)).items()):
            nodes.add_metric([name, status], count)
        for direction in ("up", "down"):
            moved.add_metric([name, direction], sums[f"bytes_{direction}"])
        families: Counter[str] = Counter()
        for one_round in rounds:
            families.update(one_round.get("families") or {})
        for family, count in sorted(families.items()):
            updates.add_metric([name, family], count)
        for verdict, key in (("accepted", "accepted"), ("refused", "rejected")):
            verdicts.add_metric([name, verdict], sums[key])
        _set(loss, [name, "train"], sums["loss"])
        _set(loss, [name, "eval"], sums["eval_loss"])
        _set(epsilon, [name], sums["epsilon"])
        _set(seconds, [name], rounds[-1]["seconds"] if rounds else None)
        _set(carry, [name], rounds[-1].get("carry_rank") if rounds else None)
        queue.add_metric([name], len(ControlQueue(run.folder).pending()))
    yield from (
        committed, missed, planned, phase, nodes, moved, updates, verdicts, loss, seconds, epsilon,
        queue, carry,
    )  # fmt: skip


def _set(metric: GaugeMetricFamily, labels: list[str], value: Any) -> None:
    if value is not None:
        metric.add_metric(labels, value)
