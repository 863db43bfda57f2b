"""Alerts by webhook: what an operator should know without looking, each said once.

Every round since the last look is read, also of runs that have ended in between: a quorum that is
missed, a loss that rises or is no number fires with the first such round and is taken back with the
first other one. What is so now, a silent node, a full disk or a broken chain, fires while it lasts; the
chain is looked at whenever the ledger's file has changed, also long after the run. What was told and how
far each run was read stands in ``.dashboard/alerts.json``, so that a dashboard that is started again
neither repeats nor misses a round. A payload is one JSON object; a receiver that fails is tried again at
the next look, and never holds anything up.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedserver.dashboard.home import home_of
from fedserver.dashboard.library import Library
from fedserver.dashboard.run_files import Row, file_stamp, read_json
from fedserver.dashboard.run_reader import LEDGER, RunReader
from fedserver.live_log import ALIVE
from fedserver.quantities import spans_text

logger = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
TIMEOUT_SECONDS = 5.0
LOSS_FACTOR, LOSS_RISE = 1.5, 0.1
"""An evaluation loss this many times the best one so far, and so many nats above it, is worth a word."""
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
        # By run: the stamps of its ledger's files when its chain was last looked at, and how it was.
        self._chains: dict[str, dict[str, Any]] = found.get("chains", {})
        self._written = True
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
        wrong, folders = list(_of_disk(self._library)), self._library.folders()
        open_now: list[Alert] = []
        for row in rows:
            alive = row["state"] in ALIVE
            changed = self._read.get(row["run"], {}).get("changed") != row["changed"]
            chain = self._chains.setdefault(row["run"], {"stamp": None, "broken": False})
            # Before the files are read: what changes meanwhile is read at the next look.
            stamp = _ledger_stamp(folders.get(row["run"]))
            looked = alive or changed or chain["stamp"] != stamp
            run = self._library.reader(row["run"]) if looked else None
            if run is not None and chain["stamp"] != stamp:
                chain |= {"stamp": stamp, "broken": _is_broken(run)}
            if chain["broken"]:
                text = "an entry does not follow the one before"
                wrong.append(Alert(f"{row['run']}:chain", "chain_broken", row["run"], text))
            if run is None or not (alive or changed):
                continue
            self._tell_rounds(run, row["changed"], alive=alive)
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
            if self._tell(RESOLVED, replace(self._told[key], text=self._over(self._told[key]))):
                del self._told[key]
        for key, alert in wrong.items():
            if key not in self._told and self._tell(FIRING, alert):
                self._told[key] = alert

    def _over(self, alert: Alert) -> str:
        """How it is now that something is no longer wrong."""
        if alert.kind == "disk_low":
            return _free(self._library)
        run = self._library.reader(alert.run)
        if run is None:
            return "the run is no longer in the folder"
        if alert.kind == "chain_broken":
            return "every entry follows the one before"
        node = alert.key.removeprefix(_silence_key(alert.run, ""))
        recent = run.recent_nodes()
        rows = [row for number in sorted(recent)[-SILENT_ROUNDS:] for row in recent[number]]
        if any(row["node"] == node and row["verdict"] != "missing" for row in rows):
            return f"{node} has answered"
        if run.live().get("state") not in ALIVE:
            return f"the run has ended; {node} has not answered"
        return f"{node} is asked no more; it has not answered"

    def _remember(self, names: set[str]) -> None:
        self._read = {name: read for name, read in self._read.items() if name in names}
        self._chains = {name: chain for name, chain in self._chains.items() if name in names}
        told = {
            "read": self._read,
            "firing": [asdict(alert) for alert in self._told.values()],
            "chains": self._chains,
        }
        draft = self._file.with_name(f".{READ}.{os.getpid()}")
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_text(json.dumps(told), encoding="utf-8")
            draft.replace(self._file)
        except OSError as error:
            # Nothing is lost while this process runs. It is said once, not at every look.
            if self._written:
                logger.warning(
                    "which alerts were sent could not be written down, so a dashboard that is started"
                    " again may repeat them: %s", error.strerror or error,
                )  # fmt: skip
            self._written = False
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        else:
            self._written = True

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
    """The first round of several that missed their quorum; they are over with the next that has it."""
    found: list[tuple[bool, Alert]] = []
    missed: list[int] = []
    for row in rounds:
        met, number = row.get("quorum", True), row["round"]
        missed = missed if met else [*missed, number]
        text = f"round {number} missed its quorum; the model stayed as it was"
        if met:
            text = f"the quorum was met again in round {number}; {spans_text(missed)} missed it"
            missed = []
        found.append((not met, Alert(f"{name}:quorum", "quorum_missed", name, text)))
    return _begun_and_over(found)


def _of_loss(name: str, rounds: list[Row]) -> list[Change]:
    found: list[tuple[bool, Alert]] = []
    best = math.inf
    for row in rounds:
        loss = row.get("eval_loss")
        if loss is not None:
            best = min(best, loss)
            risen = not loss <= max(LOSS_FACTOR * best, best + LOSS_RISE)
            text = f"evaluation loss {loss:.3f} in round {row['round']}"
            text += (
                f", the best was {best:.3f}" if risen else f", near the best of {best:.3f} again"
            )
            found.append((risen, Alert(f"{name}:loss", "loss", name, text)))
    return _begun_and_over(found)


def _of_training(name: str, rounds: list[Row]) -> list[Change]:
    found: list[tuple[bool, Alert]] = []
    for row in rounds:
        loss = row.get("loss")
        if loss is not None:
            wild = not math.isfinite(loss)
            text = f"the training loss of round {row['round']} is "
            text += "not finite" if wild else "finite again"
            found.append((wild, Alert(f"{name}:train", "loss", name, text)))
    return _begun_and_over(found)


def _begun_and_over(rounds: list[tuple[bool, Alert]]) -> list[Change]:
    """Whether each round was wrong, and what is said of it: when it begins, and when it is over."""
    found: list[Change] = []
    firing = False
    for wrong, alert in rounds:
        if wrong != firing:
            found.append((FIRING if wrong else RESOLVED, alert))
        firing = wrong
    return found


def _of_disk(library: Library) -> Iterator[Alert]:
    disk = shutil.disk_usage(library.root)
    if disk.free < DISK_SHARE * disk.total:
        yield Alert("disk", "disk_low", "", _free(library))


def _free(library: Library) -> str:
    disk = shutil.disk_usage(library.root)
    return f"{disk.free / 1e9:.1f} GB of {disk.total / 1e9:.0f} GB are free"


def _is_broken(run: RunReader) -> bool:
    return any(newer["previous"] != older["hash"] for newer, older in pairwise(run.entries()))


def _ledger_stamp(folder: Path | None) -> list[Any]:
    """What changes with a ledger, as JSON holds it."""
    if folder is None:
        return []
    stamps = (file_stamp(folder / name) for name in (LEDGER, f"{LEDGER}-wal"))
    return [None if stamp is None else list(stamp) for stamp in stamps]


def _of_silence(run: RunReader) -> Iterator[Alert]:
    recent = run.recent_nodes()
    if len(recent) < SILENT_ROUNDS:
        return
    numbers = sorted(recent)[-SILENT_ROUNDS:]
    asked = [{node["node"] for node in recent[number]} for number in numbers]
    heard = {n["node"] for r in numbers for n in recent[r] if n["verdict"] != "missing"}
    for node in sorted(set.intersection(*asked) - heard):
        text = f"{node} has not answered for {SILENT_ROUNDS} rounds"
        yield Alert(_silence_key(run.identity, node), "node_silent", run.identity, text)


def _silence_key(run: str, node: str) -> str:
    return f"{run}:silent:{node}"
