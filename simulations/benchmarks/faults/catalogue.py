"""The faults: each is inflicted while a run is in its first rounds, and lifted again.

A fault returns the nodes that it has hit and when each was free of it again (seconds since 1970). A
process that hangs is never let go on: what frees the node is the product's own doing, and its time is
counted, but for training, which may take until the plan's deadline.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import psutil

from fedhost.supervision import status_of
from simulations.benchmarks.chaos.link import Weather
from simulations.benchmarks.faults.laboratory import Laboratory, Run, wait_until

SECONDS = 60.0
CLOCK_SECONDS = 600
OFF_SECONDS = 10.0
LATENCY_SECONDS = 0.02

Lifted = dict[str, float]


@dataclass(frozen=True)
class Fault:
    """``inflict`` returns once the fault is lifted. ``overrides``: keys of the scenario.

    ``resumed``: the run may stop with a message, and is then resumed; under any other fault it goes on.
    """

    name: str
    inflict: Callable[[Laboratory, Run], Lifted]
    overrides: tuple[str, ...] = ()
    resumed: bool = False

    def allows(self, code: int) -> bool:
        """Whether a run that this fault hit may end with that exit code."""
        return code == 0 or self.resumed


def _weather(weather: Weather) -> Callable[[Laboratory, Run], Lifted]:
    """The first device's link is so for a minute."""

    def inflict(laboratory: Laboratory, run: Run) -> Lifted:
        device = laboratory.devices[0]
        device.link.weather = weather
        time.sleep(SECONDS)
        device.link.weather = Weather()
        return {device.name: time.time()}

    return inflict


def _hang(process: str, *, to_its_end: bool = False) -> Callable[[Laboratory, Run], Lifted]:
    """A process of the first device hangs for good. ``to_its_end``: lifted when it was ended."""

    def inflict(laboratory: Laboratory, run: Run) -> Lifted:
        device = laboratory.devices[0]
        wait_until(lambda: run.ended or device.process(process) is not None)
        found = device.process(process)
        assert found is not None, f"no {process} was met in the run"
        os.kill(found, signal.SIGSTOP)
        if to_its_end:
            wait_until(lambda: not psutil.pid_exists(found))
        return {device.name: time.time()}

    return inflict


def _server_hang(process: str) -> Callable[[Laboratory, Run], Lifted]:
    def inflict(laboratory: Laboratory, run: Run) -> Lifted:
        told = status_of(laboratory.server)
        assert told is not None
        os.kill(told["children"][process]["pid"], signal.SIGSTOP)
        now = time.time()
        return {device.name: now for device in laboratory.devices}

    return inflict


def _suspend(laboratory: Laboratory, run: Run) -> Lifted:
    """The first device stands still for a minute, as a closed laptop does."""
    device = laboratory.devices[0]
    processes = device.processes()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)
        if number == signal.SIGSTOP:
            time.sleep(SECONDS)
    return {device.name: time.time()}


def _clock(seconds: int) -> Callable[[Laboratory, Run], Lifted]:
    """The first device's clock jumps, and a minute later back."""

    def inflict(laboratory: Laboratory, run: Run) -> Lifted:
        device = laboratory.devices[0]
        device.clock.set(seconds)
        time.sleep(SECONDS)
        device.clock.set(0)
        return {device.name: time.time()}

    return inflict


def _server_disk(laboratory: Laboratory, run: Run) -> Lifted:
    """The server's disk has no byte left until its run has stopped."""
    laboratory.disk.fill()
    with suppress(TimeoutError):
        wait_until(lambda: run.ended, 2 * SECONDS)
    laboratory.disk.clear()
    now = time.time()
    return {device.name: now for device in laboratory.devices}


def _device_disk(laboratory: Laboratory, run: Run) -> Lifted:
    device = laboratory.devices[0]
    device.disk.fill()
    time.sleep(SECONDS)
    device.disk.clear()
    return {device.name: time.time()}


def _churn(laboratory: Laboratory, run: Run) -> Lifted:
    """In every round another device loses its power, and is switched on again ten seconds later."""
    lifted: Lifted = {}
    for number, device in enumerate(laboratory.devices, start=1):
        wait_until(partial(_reached, run, number))
        if run.ended:
            break
        device.cut_power()
        time.sleep(OFF_SECONDS)
        device.start()
        lifted[device.name] = time.time()
    return lifted


def _reached(run: Run, number: int) -> bool:
    return run.ended or run.round() >= number


CATALOGUE = (
    Fault("nothing", lambda laboratory, run: {}),
    Fault("training-hangs", _hang("model", to_its_end=True), ("deadline_seconds=40",)),
    Fault("worker-hangs", _hang("worker")),
    Fault("stub-hangs", _hang("stub")),
    Fault("node-superexec-hangs", _hang("superexec")),
    Fault("supernode-hangs", _hang("supernode")),
    Fault("device-suspended", _suspend),
    Fault("superlink-hangs", _server_hang("superlink")),
    Fault("packet-loss", _weather(Weather(loss=0.3, latency=LATENCY_SECONDS))),
    Fault("slow-link", _weather(Weather(bits_per_second=64_000, latency=LATENCY_SECONDS))),
    Fault("partition", _weather(Weather(cut=True))),
    Fault("clock-fast", _clock(CLOCK_SECONDS)),
    Fault("clock-slow", _clock(-CLOCK_SECONDS)),
    Fault("device-disk-full", _device_disk),
    Fault("server-disk-full", _server_disk, resumed=True),
    Fault("churn", _churn),
)
