"""The runs below one folder, thousands of them: found by a scan, described from small files by stamp.

A listing reads no log: ``live.json`` says what a run is, ``summary.json`` how it ended. Of a run without
a summary the losses so far are looked up once a round.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from fedserver.dashboard import sound_values
from fedserver.dashboard.run_files import Row, Stamp, file_stamp, read_json
from fedserver.dashboard.run_reader import LEDGER, METRICS, SUMMARY, RunReader, settled
from fedserver.dashboard.sound_values import sound
from fedserver.live_log import LIVE, state_of

DEPTH = 2
"""``compare`` writes its runs into a folder of their own, one level further down."""
OPEN_READERS = 16
"""Of so many runs, those last looked at, what was read is kept: each may have thousands of nodes."""
SCAN_SECONDS = 2.0
LOOK_SECONDS = 0.25
"""Within this time nobody looks at the files again, however many ask."""
SETTLED_NANOSECONDS = 2_000_000_000
"""A folder that changed less long ago than this may change once more within the same clock tick."""


class Library:
    """All runs below ``root``, or the one run that ``root`` is."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._lock = threading.RLock()
        self._rows: dict[str, tuple[Any, Row]] = {}
        self._losses: dict[str, tuple[Stamp | None, tuple[float | None, float | None]]] = {}
        self._folders: dict[str, Path] = {}
        self._listings: dict[str, tuple[int, list[str] | None]] = {}
        self._scanned = -SCAN_SECONDS
        self._seen: list[Row] = []
        self._looked = -LOOK_SECONDS
        self._readers: OrderedDict[str, RunReader] = OrderedDict()

    def rows(self) -> list[Row]:
        """One row a run, the newest first. What ended differently from what was said is said."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= LOOK_SECONDS:
                self._seen, self._looked = self._look(), time.monotonic()
            return [dict(row) for row in self._seen]

    def _look(self) -> list[Row]:
        with self._lock:
            found = [self._row(name, folder) for name, folder in self.folders().items()]
        for row in found:
            row["state"] = state_of(row["live"]) or row["state"]
        return sorted(found, key=lambda row: (row["changed"], row["run"]), reverse=True)

    def alone(self) -> str | None:
        """The name of the run that ``root`` itself is; None for a folder of runs."""
        with self._lock:
            listing = self._listing(str(self.root))
        return identity(self.root.name) if listing is not None and listing[1] is None else None

    def reader(self, name: str) -> RunReader | None:
        """The run of that name, None where there is none. Only folders that a scan found are opened."""
        with self._lock:
            folder = self._folders.get(name)
            if folder is None or not folder.is_dir():
                # It may have begun, or have gone, since the last scan.
                folder = self.folders(anew=True).get(name)
            if folder is None:
                self._readers.pop(name, None)
                return None
            reader = self._readers.pop(name, None) or RunReader(folder, name)
            self._readers[name] = reader
            while len(self._readers) > OPEN_READERS:
                self._readers.popitem(last=False)
            return reader

    def folders(self, *, anew: bool = False) -> dict[str, Path]:
        """Name -> folder of every run."""
        with self._lock:
            now = time.monotonic()
            if anew or now - self._scanned >= SCAN_SECONDS:
                found: dict[str, Path] = {}
                listings: dict[str, tuple[int, list[str] | None]] = {}
                self._scan(str(self.root), "", DEPTH, found, listings)
                self._folders, self._listings, self._scanned = found, listings, now
                self._rows = {name: row for name, row in self._rows.items() if name in found}
                self._losses = {name: one for name, one in self._losses.items() if name in found}
            return self._folders

    def _scan(
        self,
        folder: str,
        prefix: str,
        depth: int,
        found: dict[str, Path],
        listings: dict[str, tuple[int, list[str] | None]],
    ) -> None:
        """File the runs at and below a folder in ``found``; each folder is listed once a change."""
        listing = self._listing(folder)
        if listing is None:
            return
        listings[folder] = listing
        below = listing[1]
        if below is None:
            found[prefix or identity(os.path.basename(folder))] = Path(folder)
        elif depth:
            for name in below:
                inner = f"{prefix}:{identity(name)}" if prefix else identity(name)
                self._scan(f"{folder}/{name}", inner, depth - 1, found, listings)

    def _listing(self, folder: str) -> tuple[int, list[str] | None] | None:
        """When a folder changed (0: too lately to rely on it), and what is below it: None in a run's.

        The whole is None where the folder cannot be read.
        """
        try:
            changed = os.stat(folder).st_mtime_ns
            held = self._listings.get(folder)
            if held is not None and held[0] == changed:
                return held
            settled = time.time_ns() - changed > SETTLED_NANOSECONDS
            with os.scandir(folder) as listing:
                entries = {entry.name: entry for entry in listing}
        except OSError:
            return None
        below = None
        if not (LEDGER in entries or METRICS in entries or LIVE in entries):
            below = [
                name
                for name in sorted(entries)
                if not name.startswith(".") and entries[name].is_dir(follow_symlinks=False)
            ]
        return (changed if settled else 0), below

    def _row(self, name: str, folder: Path) -> Row:
        # A thousand runs: joining texts is several times as fast as joining paths.
        at = str(folder)
        stamps = tuple(file_stamp(f"{at}/{file}") for file in (LIVE, SUMMARY, METRICS))
        held = self._rows.get(name)
        if held is not None and held[0] == stamps:
            return dict(held[1])
        live = sound(read_json(folder / LIVE), sound_values.LIVE)
        summary = sound(read_json(folder / SUMMARY), sound_values.SUMMARY)
        told = settled(live, summary)
        losses = (summary.get("before") or {}).get("loss"), summary.get("eval_loss")
        if not told:
            losses = self._losses_so_far(name, folder, stamps[2])
        row = {
            "run": name,
            "name": live.get("name") or summary.get("name") or folder.name,
            "state": live.get("state") or ("finished" if summary else "unknown"),
            "preset": live.get("preset") or summary.get("preset"),
            "base_model": live.get("base_model") or summary.get("base_model"),
            "round": live.get("committed", summary.get("rounds")),
            "rounds": live.get("rounds", summary.get("rounds")),
            "nodes": live.get("nodes", summary.get("nodes")),
            "loss_before": losses[0],
            "loss_after": losses[1],
            "seed": live.get("seed", summary.get("seed")),
            "bytes_up": told.get("bytes_up"),
            "bytes_down": told.get("bytes_down"),
            "seconds": told.get("seconds"),
            "started": live.get("started"),
            "changed": max((stamp[0] for stamp in stamps if stamp), default=0) / 1e9,
            "live": live,
        }
        self._rows[name] = (stamps, row)
        return dict(row)

    def _losses_so_far(
        self, name: str, folder: Path, stamp: Stamp | None
    ) -> tuple[float | None, float | None]:
        """Once a round, not at every phase of it."""
        held = self._losses.get(name)
        if held is None or held[0] != stamp:
            found = RunReader(folder, name).losses() if stamp else (None, None)
            held = self._losses[name] = (stamp, found)
        return held[1]


def identity(name: str) -> str:
    """A folder's name as one part of a run's name; ":" stands between the parts."""
    return name.replace("~", "~0").replace(":", "~1").replace("/", "~2")
