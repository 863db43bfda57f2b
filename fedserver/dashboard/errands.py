"""A request that a process of its own carries out: an export, or a run that goes on.

``python -m fedserver.dashboard.errands QUESTION`` runs one ``fedbraid`` command, passes its output on,
and settles the request with what came of it, whether the dashboard still runs or not. An export's
outcome stands in the ledger: appended here, or by the run where one is under way and holds its ledger.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedserver.control import DONE, FAILED, OPERATOR, PENDING, REFUSED, ControlQueue, Request
from fedserver.dashboard import recording
from fedserver.dashboard.program import command_line
from fedserver.dashboard.run_files import read_json
from fedserver.ledger import LedgerError, LedgerHeldError
from fedserver.live_log import ALIVE, LIVE, state_of

PROGRAM = "fedserver.dashboard.errands"
HELD_SECONDS, LONGEST_SECONDS = 0.5, 600.0
"""How soon to look again at a ledger that another one writes, and for how long."""


def question(
    folder: Path, request: Request, words: Sequence[str], number: int, key_file: Path | None
) -> str:
    """What the process is asked. ``number``: the last committed round; ``key_file``: of the seals."""
    return json.dumps(
        {
            "folder": str(folder),
            "request": request.id,
            "words": list(words),
            "round": number,
            "key_file": None if key_file is None else str(key_file),
        }
    )


def run(asked: dict[str, Any]) -> int:
    """Carry a request out and settle it; returns the command's exit status."""
    process = subprocess.Popen(
        command_line(*asked["words"]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.strip():
            # An error may be broken over lines; it begins where its name stands.
            said = (
                [*said, line.strip()] if said and said[0].startswith("error:") else [line.strip()]
            )
    code = process.wait()
    told = " ".join(said).removeprefix("error:").strip()[:500] or f"it ended with {code}"
    folder = Path(asked["folder"])
    queue = ControlQueue(folder)
    request = queue.request(asked["request"])
    if request is None:
        return code
    if request.action != "export":
        # One that went on has recorded and settled it.
        if code and request.state == PENDING:
            queue.settle(request, REFUSED, told)
        return code
    queue.say(request, FAILED if code else DONE, told if code else request.arguments["to"])
    _record(folder, queue, request.id, asked)
    return code


def _record(folder: Path, queue: ControlQueue, identity: str, asked: dict[str, Any]) -> None:
    """Append the outcome, whoever else writes the ledger; a run under way appends it by itself."""
    key_file = None if asked["key_file"] is None else Path(asked["key_file"])
    until = time.monotonic() + LONGEST_SECONDS
    while True:
        request = queue.request(identity)
        if request is None or request.settled is not None:
            return
        wall = {"asked": request.asked, "applied": time.time()}
        try:
            recording.append(
                folder, OPERATOR, asked["round"], request.content(), wall, key_file=key_file
            )
        except LedgerHeldError as error:
            if state_of(read_json(folder / LIVE)) in ALIVE:
                return
            if time.monotonic() > until:
                print(f"error: what came of it is not recorded: {error}", flush=True)
                return
            time.sleep(HELD_SECONDS * random.uniform(0.5, 1.5))
        except LedgerError as error:
            print(f"error: what came of it is not recorded: {error}", flush=True)
            return
        else:
            queue.settle(request, request.state, request.note)
            return


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1])))
