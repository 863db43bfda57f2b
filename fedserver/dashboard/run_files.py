"""Files of other processes, which may be half there: what cannot be read is absent, not an error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NODES = b', "nodes": ['
SPAN = 1 << 27
"""Of a long file so many bytes are read, the last."""

Row = dict[str, Any]
Stamp = tuple[int, int, int]


def file_stamp(path: Path | str) -> Stamp | None:
    """What changes when a file does; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_json(path: Path) -> Row:
    """A JSON object of a file, empty where there is none."""
    try:
        return parsed(path.read_bytes())
    except OSError:
        return {}


def parsed(line: bytes) -> Row:
    """A JSON object, empty where it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def without_nodes(line: bytes) -> Row:
    """A line of metrics without the rows of its nodes, which are the last in it."""
    place = line.find(NODES)
    return parsed(line[:place] + b"}" if place > 0 else line)


def lines_from_the_end(path: Path, span: int = SPAN, block: int = 1 << 20) -> Iterator[bytes]:
    """Whole lines of the last ``span`` bytes, the last first."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        stop = max(0, end - span)
        rest: list[bytes] = []
        while end > stop:
            start = max(stop, end - block)
            file.seek(start)
            first, *others = file.read(end - start).split(b"\n")
            end = start
            if others:
                yield from filter(None, [b"".join([others.pop(), *rest]), *reversed(others)])
                rest = []
            rest.insert(0, first)
        if stop == 0 and any(rest):
            yield b"".join(rest)
