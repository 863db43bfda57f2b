"""Alerts by webhook: what an operator should know without looking, each said once until it is over.

Loss watchdog, quorum missed, node silent, disk low, chain broken. A payload is one JSON object; a
receiver that fails is tried again at the next look, and never holds anything up.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

from fedserver.dashboard.library import Library
from fedserver.dashboard.run_reader import RunReader
from fedserver.live_log import ALIVE

logger = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
TIMEOUT_SECONDS = 5.0
LOSS_FACTOR = 1.5
"""An evaluation loss this many times the best one so far is worth a word."""
SILENT_ROUNDS = 3
DISK_SHARE = 0.05


@dataclass(frozen=True)
class Alert:
    """Something that is wrong now. ``key`` stays the same as long as it does."""

    key: str
    kind: str
    run: str
    text: str


class Watchdog:
    """Looks at the library now and then, in a thread of its own, and tells the receiver."""

    def __init__(self, library: Library, address: str) -> None:
        self._library = library
        self._address = address
        self._told: dict[str, Alert] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._end.set()

    def look(self) -> list[Alert]:
        """Tell what is new and what is over; returns what is wrong now."""
        found = {alert.key: alert for alert in alerts(self._library)}
        for key in [key for key in self._told if key not in found]:
            if self._tell(self._told[key], "resolved"):
                del self._told[key]
        for key, alert in found.items():
            if key not in self._told and self._tell(alert, "firing"):
                self._told[key] = alert
        return list(found.values())

    def _tell(self, alert: Alert, status: str) -> bool:
        body = json.dumps(asdict(alert) | {"status": status, "source": "fedbraid"}).encode()
        request = urllib.request.Request(
            self._address, body, {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
                return True
        except (OSError, urllib.error.URLError) as error:
            logger.warning("the alert %s could not be sent: %s", alert.key, error)
            return False

    def _work(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            try:
                self.look()
            except Exception:
                logger.exception("alerts could not be looked for")


def alerts(library: Library) -> Iterator[Alert]:
    """Everything that is wrong now, in runs that are under way and on their disk."""
    disk = shutil.disk_usage(library.root)
    if disk.free < DISK_SHARE * disk.total:
        text = f"{disk.free / 1e9:.1f} GB of {disk.total / 1e9:.0f} GB are free"
        yield Alert("disk", "disk_low", "", text)
    for row in library.rows():
        if row["state"] in ALIVE and (run := library.reader(row["run"])) is not None:
            yield from _of_run(run)


def _of_run(run: RunReader) -> Iterator[Alert]:
    name, rounds, entries = run.identity, run.rounds(), run.entries()
    if any(newer["previous"] != older["hash"] for newer, older in pairwise(entries)):
        yield Alert(
            f"{name}:chain", "chain_broken", name, "an entry does not follow the one before"
        )
    if not rounds:
        return
    last = rounds[-1]
    losses = [row["eval_loss"] for row in rounds if row.get("eval_loss") is not None]
    if losses and not losses[-1] <= LOSS_FACTOR * min(losses):
        text = f"evaluation loss {losses[-1]:.3f}, the best was {min(losses):.3f}"
        yield Alert(f"{name}:loss", "loss", name, text)
    if last["loss"] is not None and not math.isfinite(last["loss"]):
        yield Alert(f"{name}:train", "loss", name, "the training loss is not finite")
    entry = run.round_entry(last["round"])
    if entry is not None and not entry["content"].get("quorum", True):
        text = f"round {last['round']} missed its quorum; the model stayed as it was"
        yield Alert(f"{name}:quorum", "quorum_missed", name, text)
    recent = run.recent_nodes()
    if len(recent) >= SILENT_ROUNDS:
        numbers = sorted(recent)[-SILENT_ROUNDS:]
        asked = [{node["node"] for node in recent[number]} for number in numbers]
        heard = {n["node"] for r in numbers for n in recent[r] if n["verdict"] != "missing"}
        for node in sorted(set.intersection(*asked) - heard):
            text = f"{node} has not answered for {SILENT_ROUNDS} rounds"
            yield Alert(f"{name}:silent:{node}", "node_silent", name, text)
