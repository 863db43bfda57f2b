"""Replays of a round: its state made again from the recorded updates, in a process with torch.

A replay changes nothing, so it is no action of the ledger; it costs a processor for a while, so only
operators start one.
"""

from __future__ import annotations

import threading
from typing import Any

from fedserver.dashboard.jobs import Job, Jobs, printed
from fedserver.dashboard.page import NotThere, Page
from fedserver.dashboard.round_views import header
from fedserver.dashboard.run_reader import RunReader

REMEMBERED = 200


class Replays:
    """The newest replay of each round that somebody asked for since the dashboard was started."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._found: dict[tuple[str, int], Job] = {}
        self._lock = threading.Lock()

    def start(self, run: RunReader, number: int) -> None:
        """Replay a run from its base to a round, unless that is being done.

        Raises:
            NotThere: the round was not committed.
            JobError: too much is at work.
        """
        if all(row["round"] != number for row in run.rounds()):
            raise NotThere(f"round {number} was not committed")
        with self._lock:
            held = self._found.pop((run.identity, number), None)
            if held is None or held.process.poll() is not None:
                command = ["ledger", "replay", str(run.folder), "--round", str(number), "--json"]
                title = f"replay to round {number}"
                held = self._jobs.start(title, run.identity, command, run.folder)
            self._found[run.identity, number] = held
            while len(self._found) > REMEMBERED:
                del self._found[next(iter(self._found))]

    def page(self, run: RunReader, number: int) -> Page:
        """How far the replay of a round is: the digest that the ledger has, and the one it gave."""
        # Not the one that is kept: the folder may hold another run of that name by now.
        entry = run.entry("round", number)
        if entry is None:
            raise NotThere(f"round {number} was not committed")
        data: dict[str, Any] = {
            **header(run),
            "shown": number,
            "recorded": entry["content"].get("state"),
            "state": "not asked",
            "replayed": None,
            "equal": None,
            "rounds_done": 0,
            "said": "",
        }
        with self._lock:
            job = self._found.get((run.identity, number))
        if job is None or not job.log.is_file():
            return Page(data)
        code = job.process.poll()
        lines = [one for one in printed(job.log) if {"round", "found", "equal"} <= set(one)]
        done = [line for line in lines if line.get("rolled_back_to") is None]
        last = next((line for line in done if line.get("round") == number), None)
        data["rounds_done"] = len(done)
        if last is not None:
            data |= {"state": "finished", "replayed": last["found"]}
            data["equal"] = last["found"] == data["recorded"]
        elif code is None:
            data["state"] = "working"
        else:
            data |= {"state": "failed", "said": job.json()["said"]}
        return Page(data)
