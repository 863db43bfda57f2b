"""Views over many runs: the list, a comparison, and what the server itself uses."""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from fedhost.process_identity import is_alive, number_of
from fedserver.dashboard.jobs import jobs_table
from fedserver.dashboard.library import Library
from fedserver.dashboard.page import Page, Question, page_of, run_address
from fedserver.dashboard.round_views import MOVED, header, moved, totals
from fedserver.dashboard.run_files import Row
from fedserver.dashboard.run_reader import RunReader
from fedserver.dashboard.standings import rollbacks
from fedserver.dashboard.tables import Column, LazyRows, make_table
from fedserver.intervals import estimate
from fedserver.live_log import ALIVE

RUNS = (
    Column("name", "Run", link="address"),
    Column("run", "Folder"),
    Column("seed", "Seed"),
    Column("state", "State", "state"),
    Column("round", "Rounds done", "count"),
    Column("rounds", "Rounds", "count"),
    Column("nodes", "Nodes", "count"),
    Column("preset", "Preset"),
    Column("base_model", "Base model"),
    Column("loss_before", "Loss before", "loss"),
    Column("loss_after", "Last loss", "loss"),
    Column("bytes_up", "Sent", "bytes"),
    Column("bytes_down", "Received", "bytes"),
    Column("seconds", "Took", "seconds"),
    Column("changed", "Changed", "time"),
)
COMPARED = (
    Column("name", "Run", link="address"),
    Column("run", "Folder"),
    Column("group", "Group"),
    Column("seed", "Seed"),
    Column("round", "Rounds", "count"),
    Column("loss", "Evaluation loss", "loss"),
    Column("accuracy", "Accuracy", "share"),
    Column("bytes_up", "Sent", "bytes"),
    Column("bytes_down", "Received", "bytes"),
    Column("seconds", "Took", "seconds"),
    Column("head", "Ledger head", "hash"),
)
PRESENT = "present"
"""Stands for a node that a run has, beside its settings."""
SETTINGS = (Column("key", "Setting"),)
PROCESSES = (
    Column("name", "Run", link="address"),
    Column("run", "Folder"),
    Column("host", "Host"),
    Column("pid", "Process"),
    Column("cpu_share", "Processor", "share"),
    Column("memory_bytes", "Memory", "bytes"),
)
MOST_COMPARED = 24
LARGEST_LOSS = 1e100
"""Nats a token; what is beyond it, or no number, has no mean with others."""
SHORTEST_LOOK = 0.5
"""Processor seconds, or seconds of a process, between two looks: of less no share can be made."""
STARTED = time.time()


def runs(library: Library, question: Question) -> Page:
    """All runs below the folder, the newest first."""
    rows = library.rows()
    wanted = question.values.get("state", "")
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["state"]] = counts.get(row["state"], 0) + 1
        row["address"] = run_address(row["run"])
    shown = [row for row in rows if not wanted or row["state"] == wanted]

    def complete(row: Row) -> Row:
        run = library.reader(row["run"]) if row["bytes_up"] is None else None
        return row if run is None else row | moved(run)

    data = {"folder": str(library.root), "counts": counts, "state": wanted, "runs": len(rows)}
    return page_of(
        data,
        make_table(
            "runs",
            "Runs",
            RUNS,
            LazyRows(shown, complete),
            question.choice,
            empty="No run here yet: fedbraid simulate quickstart makes one.",
        ),
    )


def compare(library: Library, question: Question) -> Page:
    """Chosen runs over each other. Runs that differ in nothing but the seed are one group."""
    asked = question.runs[:MOST_COMPARED]
    chosen = [r for r in map(library.reader, asked) if r is not None]
    flat = {run.identity: flatten(run.configuration()) for run in chosen}
    groups: dict[str, list[RunReader]] = {}
    for run in chosen:
        key = str(sorted((k, v) for k, v in flat[run.identity].items() if k != "seed"))
        groups.setdefault(key, []).append(run)
    names = _group_names(groups)
    rows, bands = [], []
    for members, name in zip(groups.values(), names, strict=True):
        bands.append({"group": name, **_band(members), "runs": [run.identity for run in members]})
        for run in members:
            top, sums = header(run), totals(run)
            rows.append(
                {
                    "name": top["name"],
                    "run": run.identity,
                    "address": run_address(run.identity),
                    "group": name,
                    "seed": flat[run.identity].get("seed"),
                    "round": top["round"],
                    "loss": sums["eval_loss"],
                    "accuracy": sums["eval_accuracy"],
                    **{k: sums[k] for k in MOVED},
                    "head": top["head"],
                }
            )
    settings_rows = [
        {"key": key, **{run.identity: _shown(flat[run.identity].get(key)) for run in chosen}}
        for key in _differing(list(flat.values()))
    ]
    columns = [*SETTINGS, *(Column(run.identity, run.identity, "mono") for run in chosen)]
    recent = [{"run": row["run"], "name": row["name"]} for row in library.rows()[:100]]
    data = {
        "chosen": [run.identity for run in chosen],
        "unknown": [n for n in asked if n not in {run.identity for run in chosen}],
        "groups": bands,
        "choices": recent,
    }
    return page_of(
        data,
        make_table(
            "compared", "Runs", COMPARED, rows, question.choice, searchable=False,
            empty="Choose runs to compare.",
        ),
        make_table(
            "settings", "Settings that differ", columns, settings_rows, question.choice,
            searchable=False, empty="These runs have the same settings.",
        ),
    )  # fmt: skip


class Meters:
    """Shares of processors since somebody looked last: the first look at a process has none."""

    def __init__(self) -> None:
        self._processes: dict[str, tuple[psutil.Process, float, float | None]] = {}
        self._before = _processor_seconds()
        self._share = 0.0

    def machine(self) -> float:
        """The processors' share that was at work since the last look, or since the start.

        psutil's own memory is of a thread, and every request may be another one's.
        """
        busy, whole = _processor_seconds()
        if whole - self._before[1] >= SHORTEST_LOOK:
            self._share = (busy - self._before[0]) / (whole - self._before[1])
            self._before = busy, whole
        return self._share

    def read(self, identity: str) -> dict[str, float | None]:
        """Processor share and memory of a process; None where it has gone, or is looked at first."""
        try:
            now = time.monotonic()
            process, looked, share = self._processes.get(identity, (None, now, None))
            if not is_alive(identity):
                self._processes.pop(identity, None)
                return {"cpu_share": None, "memory_bytes": None}
            if process is None:
                self._processes = {one: of for one, of in self._processes.items() if is_alive(one)}
                process = psutil.Process(number_of(identity))
                process.cpu_percent()
            elif now - looked >= SHORTEST_LOOK:
                share, looked = process.cpu_percent() / 100, now
            self._processes[identity] = process, looked, share
            return {"cpu_share": share, "memory_bytes": process.memory_info().rss}
        except psutil.Error:
            return {"cpu_share": None, "memory_bytes": None}


def _processor_seconds() -> tuple[float, float]:
    """Of all processors: at work, and altogether."""
    times = psutil.cpu_times()._asdict()
    # A guest's time is also the user's.
    whole = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
    return whole - times["idle"] - times.get("iowait", 0.0), whole


def server(
    library: Library,
    viewers: int,
    jobs: Sequence[Mapping[str, Any]],
    meters: Meters,
    question: Question,
) -> Page:
    """This machine, this process, the runs that are under way, and what was started from here."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(library.root)
    own = psutil.Process()
    rows = [
        {
            "name": row["name"],
            "run": row["run"],
            "address": run_address(row["run"]),
            **_process(row["live"], meters),
        }
        for row in library.rows()
        if row["state"] in ALIVE
    ]
    data = {
        "folder": str(library.root),
        "host": socket.gethostname(),
        "cores": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "cpu_share": meters.machine(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "disk_bytes": disk.total,
        "disk_free_bytes": disk.free,
        "dashboard_memory_bytes": own.memory_info().rss,
        "dashboard_seconds": time.time() - STARTED,
        "viewers": viewers,
        "runs": len(library.folders()),
    }
    return page_of(
        data,
        make_table(
            "processes", "Runs under way", PROCESSES, rows, question.choice,
            searchable=False, empty="No run is under way.",
        ),
        jobs_table(jobs, question.choice, library.folders()),
    )  # fmt: skip


def _process(live: Row, meters: Meters) -> Row:
    """A run's process: what it takes can be seen on its own host alone."""
    told = live.get("process")
    process = told if isinstance(told, str) else ""
    here = live.get("host") == socket.gethostname()
    used = meters.read(process) if here and process else {}
    return {"host": live.get("host"), "pid": process.partition("@")[0], **used}


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys; nodes by their names."""
    if isinstance(settings, dict):
        found: dict[str, Any] = {}
        for key, value in settings.items():
            found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return found
    if isinstance(settings, list) and settings and all(isinstance(s, dict) for s in settings):
        found = {}
        for place, value in enumerate(settings):
            name = value.get("name", place)
            rest = {k: v for k, v in value.items() if k != "name" and v is not None}
            found |= flatten(rest, f"{prefix}.{name}")
            found[f"{prefix}.{name}"] = PRESENT
        return found
    return {prefix: settings}


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that read differently in some runs; of a node that a run does not have, only that."""
    keys = {key for one in settings for key in one}
    everywhere = {key for key in keys if all(key in one for one in settings)}
    listed = {key for one in settings for key, value in one.items() if value == PRESENT}

    def owner(key: str) -> str:
        while (key := key.rpartition(".")[0]) and key not in listed:
            pass
        return key

    return sorted(
        key
        for key in keys
        if len({_shown(one.get(key)) for one in settings}) > 1
        and ((of := owner(key)) == "" or of in everywhere)
    )


def _band(members: Sequence[RunReader]) -> dict[str, Any]:
    """Mean evaluation loss by round with a 95 % t interval over the runs that reached it."""
    by_round: dict[int, list[float]] = {}
    for run in members:
        for row in run.rounds():
            loss = row.get("eval_loss")
            if loss is not None and abs(loss) <= LARGEST_LOSS:
                by_round.setdefault(row["round"], []).append(loss)
    found = [(number, estimate(by_round[number])) for number in sorted(by_round)]
    known = [(number, one) for number, one in found if one is not None]
    return {
        "round": [number for number, _ in known],
        "mean": [one.mean for _, one in known],
        "low": [one.low if one.half_width is not None else None for _, one in known],
        "high": [one.high if one.half_width is not None else None for _, one in known],
        "count": [one.count for _, one in known],
        "rollbacks": [[*pair, header(run)["name"]] for run in members for pair in rollbacks(run)],
    }


def _group_names(groups: Mapping[str, Sequence[RunReader]]) -> list[str]:
    found: list[str] = []
    for members in groups.values():
        name = header(members[0])["name"]
        if len(members) > 1:
            name = re.sub(r"[-_. ]*(seed)?[-_. ]*\d+$", "", name) or name
        number = sum(other == name or other.startswith(f"{name} (") for other in found)
        found.append(f"{name} ({number + 1})" if number else name)
    return found


def _shown(value: Any) -> str | None:
    """As it reads; None for what is not set."""
    return None if value is None or value == "" else str(value)
