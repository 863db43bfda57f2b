"""What viewers of the dashboard cost the run that they look at, measured within one run.

Rounds come in blocks of eight: alone, viewed, viewed, alone, and four alone. In the first four each
viewed round is paired with the neighbour that had no viewers; the other four are paired in the same way
and show what such a ratio is when there is nothing to find. Neighbours share what a busy machine does to
both, and their order turns round within a block, so that a machine that grows slower favours neither.

Viewers are other machines in life, and a dashboard that serves many of them has a core of its own: the
run is pinned to one processor, the dashboard and the viewers to the others. What is left to find is what
reaches the run itself: its files being read, its ledger's readers, memory and caches. What the dashboard
takes of its own processor is told beside it. With one processor nothing is pinned.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedserver import events
from fedserver.configuration import load
from fedserver.dashboard.accounts import VIEWER, Accounts
from simulations.benchmarks.dashboard_process import dashboard_process
from simulations.benchmarks.paired_ratios import MedianRatio, median_ratio
from simulations.benchmarks.viewers import viewers

BLOCK = 8
WARM_UP = 4
"""The first rounds also load and compile."""
VIEWED = (1, 2)
"""Places within a block at which viewers look on."""
PAIRS, CONTROL_PAIRS = ((0, 1), (3, 2)), ((4, 5), (7, 6))


@dataclass(frozen=True)
class ViewedRounds:
    """Ratios of viewed rounds to their neighbours, and of unviewed ones; seconds a round of the server.

    ``pinned``: whether the run had a processor of its own.
    """

    time: MedianRatio
    time_control: MedianRatio
    work: MedianRatio
    work_control: MedianRatio
    serving: tuple[float, float]
    pinned: bool


def measure(rounds: int, viewers_count: int, steps: int) -> ViewedRounds:
    """Run a tiny model over six nodes for at least ``rounds`` rounds of ``steps`` steps a node."""
    from simulations.engines import run_local
    from simulations.tiny_model import write_scenario

    total = WARM_UP + BLOCK * max(1, -(-rounds // BLOCK))
    changes = ["evaluate=false", f"local_steps={steps}", "micro_batch_size=8"]
    taken, worked, served = ([0.0] * total for _ in range(3))
    own, others = _cores()
    allowed = os.sched_getaffinity(0)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch) / "runs"
            root.mkdir()
            token = Accounts(root).issue_token("benchmark", VIEWER)
            configuration = load(str(write_scenario(Path(scratch) / "tiny", total, 6)), changes)
            with dashboard_process(root, others) as (link, server):
                address = link.partition("/login")[0]
                stream = "/runs/run/stream?live=1"
                with viewers(address, stream, token, viewers_count, others) as watching:
                    _pin(own)

                    def listen(event: events.Event) -> None:
                        # The round's own clock starts after RoundStarted, stops before RoundCommitted.
                        if isinstance(event, events.RoundStarted):
                            place = event.round - 1
                            if _viewed(place):
                                watching.turn("on")
                            worked[place] = -time.process_time()
                            served[place] = -sum(server.cpu_times()[:2])
                        elif isinstance(event, events.RoundCommitted):
                            place = event.round - 1
                            worked[place] += time.process_time()
                            served[place] += sum(server.cpu_times()[:2])
                            taken[place] = event.seconds
                            if _viewed(place):
                                watching.turn("off")

                    run_local(configuration, root / "run", listen)
    finally:
        _pin(allowed)
    shares = [
        sum(served[place] for place in places) / len(places)
        for places in (
            [place for place in range(WARM_UP, total) if _viewed(place) is viewed]
            for viewed in (False, True)
        )
    ]
    return ViewedRounds(
        time=median_ratio(_pairs(taken, PAIRS)),
        time_control=median_ratio(_pairs(taken, CONTROL_PAIRS)),
        work=median_ratio(_pairs(worked, PAIRS)),
        work_control=median_ratio(_pairs(worked, CONTROL_PAIRS)),
        serving=(shares[0], shares[1]),
        pinned=bool(others),
    )


def _viewed(place: int) -> bool:
    return place >= WARM_UP and (place - WARM_UP) % BLOCK in VIEWED


def _pairs(values: Sequence[float], places: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    return [
        (values[block + first], values[block + second])
        for block in range(WARM_UP, len(values), BLOCK)
        for first, second in places
    ]


def _cores() -> tuple[set[int], set[int]]:
    """The run's processor and the others; where there is but one, both share it."""
    first, *others = sorted(os.sched_getaffinity(0))
    return ({first} if others else set()), set(others)


def _pin(cores: set[int]) -> None:
    """Every thread of this process; those that begin later follow the one that begins them."""
    for thread in os.listdir("/proc/self/task") if cores else ():
        os.sched_setaffinity(int(thread), cores)
