"""Alerts by webhook: what an operator should know without looking, each said once.

Every round since the last look is read, also of runs that have ended in between: a round that missed its
quorum is an event of its own, a loss that rises or is no number fires and is taken back. What is so now,
a silent node, a full disk or a broken chain, fires while it lasts. How far each run was read stands in
``.dashboard/alerts.json``, so that a dashboard that is started again neither repeats nor misses a round.
A payload is one JSON object; a receiver that fails is tried again at the next look, and never holds
anything up.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPException
from itertools import pairwise

from fedserver.dashboard.home import home_of
from fedserver.dashboard.library import Library
from fedserver.dashboard.run_reader import Row, RunReader, read_json
from fedserver.live_log import ALIVE

logger = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
TIMEOUT_SECONDS = 5.0
LOSS_FACTOR = 1.5
"""An evaluation loss this many times the best one so far is worth a word."""
SILENT_ROUNDS = 3
DISK_SHARE = 0.05
READ = "alerts.json"
FIRING, RESOLVED = "firing", "resolved"


@dataclass(frozen=True)
class Alert:
    """Something that is or was wrong. ``key`` stays the same as long as it is."""

    key: str
    kind: str
    run: str
    text: str


Change = tuple[str, Alert]
"""FIRING or RESOLVED, and what."""


class Watchdog:
    """Looks at the library now and then, in a thread of its own, and tells the receiver."""

    def __init__(self, library: Library, address: str) -> None:
        self._library = library
        self._address = address
        self._file = home_of(library.root) / READ
        found = read_json(self._file)
        self._first = not found
        # By run: how much of each stream was told, and when the run had changed last.
        self._read: dict[str, dict[str, float]] = found.get("read", {})
        self._told = {one["key"]: Alert(**one) for one in found.get("firing", ())}
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
        rows = self._library.rows()
        wrong = list(_of_disk(self._library))
        open_now: list[Alert] = []
        for row in rows:
            alive = row["state"] in ALIVE
            changed = self._read.get(row["run"], {}).get("changed") != row["changed"]
            firing = any(alert.run == row["run"] for alert in self._told.values())
            run = self._library.reader(row["run"]) if alive or changed or firing else None
            if run is None:
                continue
            # Before the files are read: what changes meanwhile is read at the next look.
            self._tell_rounds(run, row["changed"], alive=alive)
            wrong += _of_chain(run)
            if alive or (changed and not self._first):
                wrong += _of_silence(run)
            if alive:
                open_now += [one for stream in _streams(run).values() for one in _open(stream)]
        self._tell_conditions({alert.key: alert for alert in wrong})
        self._first = False
        self._remember({row["run"] for row in rows})
        return wrong + open_now

    def _tell_rounds(self, run: RunReader, changed: float, *, alive: bool) -> None:
        """Tell what the rounds since the last look brought, in their order, as far as it is heard."""
        streams = _streams(run)
        read = self._read.get(run.identity)
        if read is None:
            # At the first look of all, what was over before is history.
            read = dict.fromkeys(streams, 0.0)
            if self._first:
                read = {n: len(s) - (len(_open(s)) if alive else 0) for n, s in streams.items()}
        heard = True
        for name, stream in streams.items():
            # A shorter history is another run of that name.
            place = int(read.get(name, 0)) if read.get(name, 0) <= len(stream) else 0
            while place < len(stream) and heard:
                heard = self._tell(*stream[place])
                place += heard
            read[name] = place
        self._read[run.identity] = read | ({"changed": changed} if heard else {})

    def _tell_conditions(self, wrong: dict[str, Alert]) -> None:
        for key in [key for key in self._told if key not in wrong]:
            if self._tell(RESOLVED, self._told[key]):
                del self._told[key]
        for key, alert in wrong.items():
            if key not in self._told and self._tell(FIRING, alert):
                self._told[key] = alert

    def _remember(self, names: set[str]) -> None:
        self._read = {name: read for name, read in self._read.items() if name in names}
        told = {"read": self._read, "firing": [asdict(alert) for alert in self._told.values()]}
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._file.with_name(f".{READ}.{os.getpid()}")
        draft.write_text(json.dumps(told), encoding="utf-8")
        draft.replace(self._file)

    def _tell(self, status: str, alert: Alert) -> bool:
        body = json.dumps(asdict(alert) | {"status": status, "source": "fedbraid"}).encode()
        request = urllib.request.Request(
            self._address, body, {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
                return True
        except (OSError, HTTPException) as error:
            logger.warning("the alert %s could not be sent: %s", alert.key, error)
            return False

    def _work(self) -> None:
        while not self._end.is_set():
            try:
                self.look()
            except Exception:
                logger.exception("alerts could not be looked for")
            self._end.wait(LOOK_SECONDS)


def _streams(run: RunReader) -> dict[str, list[Change]]:
    """By kind what the rounds so far brought, in their order; more rounds only make it longer."""
    name, rounds = run.identity, run.rounds()
    return {
        "quorum": _of_quorum(name, rounds),
        "loss": _of_loss(name, rounds),
        "train": _of_training(name, rounds),
    }


def _open(stream: list[Change]) -> list[Alert]:
    """What fired last and was not taken back: with one thing at a time, the end of a stream."""
    found: list[Alert] = []
    for status, alert in reversed(stream):
        if status != FIRING:
            break
        found.append(alert)
    return found


def _of_quorum(name: str, rounds: list[Row]) -> list[Change]:
    """Each round that missed its quorum; all are over with the next one that has it."""
    found: list[Change] = []
    missed: list[Alert] = []
    for row in rounds:
        if row.get("quorum", True):
            found += [(RESOLVED, alert) for alert in missed]
            missed = []
            continue
        text = f"round {row['round']} missed its quorum; the model stayed as it was"
        missed.append(Alert(f"{name}:quorum:{row['round']}", "quorum_missed", name, text))
        found.append((FIRING, missed[-1]))
    return found


def _of_loss(name: str, rounds: list[Row]) -> list[Change]:
    found: list[Alert | None] = []
    best = math.inf
    for row in rounds:
        loss = row.get("eval_loss")
        if loss is not None:
            best = min(best, loss)
            text = f"evaluation loss {loss:.3f} in round {row['round']}, the best was {best:.3f}"
            risen = Alert(f"{name}:loss", "loss", name, text)
            found.append(None if loss <= LOSS_FACTOR * best else risen)
    return _begun_and_over(found)


def _of_training(name: str, rounds: list[Row]) -> list[Change]:
    found: list[Alert | None] = []
    for row in rounds:
        loss = row.get("loss")
        if loss is not None:
            text = f"the training loss of round {row['round']} is not finite"
            wild = Alert(f"{name}:train", "loss", name, text)
            found.append(None if math.isfinite(loss) else wild)
    return _begun_and_over(found)


def _begun_and_over(wrong: list[Alert | None]) -> list[Change]:
    """What was wrong in each round, None for nothing: told when it begins, and when it is over."""
    found: list[Change] = []
    firing: Alert | None = None
    for alert in wrong:
        if alert is None:
            found += [(RESOLVED, firing)] if firing is not None else []
            firing = None
        elif firing is None:
            firing = alert
            found.append((FIRING, alert))
    return found


def _of_disk(library: Library) -> Iterator[Alert]:
    disk = shutil.disk_usage(library.root)
    if disk.free < DISK_SHARE * disk.total:
        text = f"{disk.free / 1e9:.1f} GB of {disk.total / 1e9:.0f} GB are free"
        yield Alert("disk", "disk_low", "", text)


def _of_chain(run: RunReader) -> Iterator[Alert]:
    if any(newer["previous"] != older["hash"] for newer, older in pairwise(run.entries())):
        text = "an entry does not follow the one before"
        yield Alert(f"{run.identity}:chain", "chain_broken", run.identity, text)


def _of_silence(run: RunReader) -> Iterator[Alert]:
    recent = run.recent_nodes()
    if len(recent) < SILENT_ROUNDS:
        return
    numbers = sorted(recent)[-SILENT_ROUNDS:]
    asked = [{node["node"] for node in recent[number]} for number in numbers]
    heard = {n["node"] for r in numbers for n in recent[r] if n["verdict"] != "missing"}
    for node in sorted(set.intersection(*asked) - heard):
        text = f"{node} has not answered for {SILENT_ROUNDS} rounds"
        key = f"{run.identity}:silent:{node}"
        yield Alert(key, "node_silent", run.identity, text)
