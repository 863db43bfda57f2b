"""What the dashboard does to a ledger that nobody else holds: appending an entry, and hashing all of it.

Sealing and verifying load torch, which is as large as the rest of the dashboard and its viewers. So both
happen in a process of their own, and the dashboard's memory stays what it is.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedserver.dashboard.program import command_line
from fedserver.ledger import Ledger, LedgerError, LedgerHeldError

PROGRAM = "fedserver.dashboard.recording"
LONGEST_SECONDS = 1800.0
"""A verification that takes longer is ended."""


def append(
    folder: Path,
    kind: str,
    number: int,
    content: dict[str, Any],
    wall: dict[str, Any],
    *,
    key_file: Path | None = None,
    create: bool = False,
) -> None:
    """Append one entry; returns when it is durable. ``create``: the ledger too, if there is none.

    Raises:
        LedgerHeldError: another process writes the ledger.
        LedgerError: it cannot be written.
    """
    _ask(
        {
            "folder": str(folder),
            "entry": [kind, number, content, wall],
            "key_file": None if key_file is None else str(key_file),
            "create": create,
        }
    )


async def verify(folder: Path) -> dict[str, Any]:
    """``problems``, ``height`` and ``head`` of a ledger, every entry and blob hashed again."""
    process = await asyncio.create_subprocess_exec(
        *command_line(program=PROGRAM),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    question = json.dumps({"folder": str(folder), "entry": None}).encode()
    try:
        async with asyncio.timeout(LONGEST_SECONDS):
            told, said = await process.communicate(question)
        return _read(told.decode(), said.decode(errors="replace"), process.returncode)
    except TimeoutError:
        problem = (
            f"it was not verified within {LONGEST_SECONDS / 60:.0f} minutes: run fedbraid ledger"
            f" verify {folder}"
        )
        return {"problems": [problem], "height": 0, "head": ""}
    except LedgerError as error:
        return {"problems": [str(error)], "height": 0, "head": ""}
    finally:
        # Also where the server is stopped meanwhile.
        if process.returncode is None:
            process.kill()
            await process.communicate()


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        command_line(program=PROGRAM),
        input=json.dumps(question, allow_nan=False),
        capture_output=True,
        text=True,
    )
    return _read(done.stdout, done.stderr, done.returncode)


def _read(told: str, said: str, code: int | None) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(told)
    except ValueError:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise LedgerError(f"the ledger's process ended with {code}: {last}") from None
    if "error" in answer:
        raise (LedgerHeldError if answer["held"] else LedgerError)(answer["error"])
    return answer


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    folder, entry = Path(question["folder"]), question["entry"]
    try:
        if entry is None:
            ledger = Ledger(folder)
        else:
            key_file = question["key_file"]
            ledger = Ledger(
                folder,
                create=question["create"],
                write=True,
                key_file=None if key_file is None else Path(key_file),
            )
        try:
            if entry is not None:
                if not _stands(ledger, entry[0], entry[2]):
                    ledger.append(*entry)
                return {"head": ledger.head}
            return {"problems": ledger.verify(), "height": ledger.height, "head": ledger.head}
        finally:
            ledger.close()
    except (LedgerError, OSError) as error:
        return {"error": str(error), "held": isinstance(error, LedgerHeldError)}


def _stands(ledger: Ledger, kind: str, content: dict[str, Any]) -> bool:
    """Whether an operator's request was recorded already, by the run that it was made of."""
    request = content.get("request")
    return request is not None and any(
        entry.content.get("request") == request for entry in ledger.entries(kind)
    )


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
