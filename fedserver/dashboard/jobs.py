"""What an operator starts from the dashboard: ``fedbraid`` commands as processes of their own.

They outlive the dashboard. Their output goes to a file beside the accounts; pages show its last line.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedserver.dashboard.home import home_of
from fedserver.dashboard.page import run_address
from fedserver.dashboard.program import FEDBRAID, command_line
from fedserver.dashboard.sentences import sentence, spoken
from fedserver.dashboard.tables import Choice, Column, Table, make_table

MOST_AT_ONCE = 4
REMEMBERED = 50
MOST_SAID = 300
LAST_BYTES = 1 << 18
JOBS = (
    Column("title", "Job"),
    Column("run", "Run", link="address"),
    Column("state", "State", "state"),
    Column("began", "Began", "time"),
    Column("said", "Said last"),
)


class JobError(Exception):
    """A job cannot be started; the message says why."""


@dataclass
class Job:
    """One command. ``title`` says what it does, ``run`` for which run."""

    title: str
    run: str
    log: Path
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.time)

    def json(self) -> dict[str, Any]:
        """As a page shows it."""
        code = self.process.poll()
        state = "working" if code is None else "finished" if code == 0 else "failed"
        return {
            "title": self.title,
            "run": self.run,
            "state": state,
            "began": self.began,
            "said": in_words(_last_line(self.log)),
        }


class Jobs:
    """The jobs of this dashboard, the newest first."""

    def __init__(self, root: Path) -> None:
        self._folder = home_of(root)
        self._jobs: list[Job] = []
        self._lock = threading.Lock()

    def start(
        self,
        title: str,
        run: str,
        arguments: Sequence[str],
        where: Path,
        *,
        program: str = FEDBRAID,
        ended: Callable[[], None] | None = None,
    ) -> Job:
        """Run ``fedbraid ARGUMENTS`` in a folder, or another program of this one.

        ``ended`` is called when the process has, from a thread of its own, while this dashboard lives.

        Raises:
            JobError: too many are at work.
        """
        with self._lock:
            if sum(job.process.poll() is None for job in self._jobs) >= MOST_AT_ONCE:
                raise JobError(f"{MOST_AT_ONCE} jobs are at work; wait for one to end")
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            log = self._folder / f"job-{time.time_ns()}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command_line(*arguments, program=program),
                    cwd=where,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            job = Job(title, run, log, process)
            self._jobs.insert(0, job)
            if ended is not None:
                threading.Thread(target=_follow, args=(process, ended), daemon=True).start()
            for old in [job for job in self._jobs[REMEMBERED:] if job.process.poll() is not None]:
                self._jobs.remove(old)
                old.log.unlink(missing_ok=True)
            return job

    def working(self, run: str) -> bool:
        """Whether a job of that run is at work."""
        with self._lock:
            return any(job.run == run and job.process.poll() is None for job in self._jobs)

    def json(self, *runs: str) -> list[dict[str, Any]]:
        """All jobs, or those of some runs."""
        with self._lock:
            return [job.json() for job in self._jobs if not runs or job.run in runs]


def jobs_table(
    jobs: Sequence[Mapping[str, Any]], choice: Choice, runs: Collection[str] = ()
) -> Table:
    """Jobs as a table, the newest first; those of ``runs``, which are there, lead to their run."""
    rows = [
        {**job, "address": run_address(job["run"]) if job["run"] in runs else None} for job in jobs
    ]
    return make_table(
        "jobs",
        "Jobs of this dashboard",
        JOBS,
        rows,
        choice,
        empty="Nothing was started from here since this dashboard began.",
    )


def printed(log: Path) -> list[dict[str, Any]]:
    """The JSON objects that a job has printed, a line each; none where its log has gone."""
    found = []
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def in_words(line: str) -> str:
    """A line of a program's output as a person reads it: of a JSON object its event and what it says."""
    try:
        value = json.loads(line)
    except ValueError:
        return line[:MOST_SAID]
    if not isinstance(value, dict):
        return line[:MOST_SAID]
    if text := sentence(value):
        about = [f"round {value['round']}" if value.get("round") else "", value.get("node")]
        return ": ".join(filter(None, [", ".join(filter(None, about)), text]))[:MOST_SAID]
    event = str(value.pop("event", "")).replace("_", " ")
    if text := value.get("text") or value.get("error"):
        parts = [str(text)]
    else:
        parts = [
            f"{key.replace('_', ' ')} {spoken(one)}"
            for key, one in value.items()
            if key != "time" and not isinstance(one, (dict, list)) and one not in (None, "")
        ]
    return ": ".join(filter(None, [event, ", ".join(parts)]))[:MOST_SAID]


def refusal_of(arguments: Sequence[str], where: Path) -> str:
    """What ``fedbraid ARGUMENTS``, which ends soon, says against it; "" where it says nothing."""
    done = subprocess.run(
        command_line(*arguments),
        cwd=where,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if not done.returncode:
        return ""
    return done.stderr.partition("error:")[2].strip()[:500] or f"it ended with {done.returncode}"


def _follow(process: subprocess.Popen[bytes], ended: Callable[[], None]) -> None:
    process.wait()
    ended()


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            lines = [
                line for line in file.read().decode(errors="replace").splitlines() if line.strip()
            ]
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
