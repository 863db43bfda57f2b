"""One run folder as the dashboard reads it: ledger, metrics and live files, each cached by its stamp.

The ledger is opened read-only and never locked, so a reader cannot hold up a run. Rows of rounds come
from ``metrics.jsonl`` without their nodes; a round's nodes are read from its ledger entry when asked
for. What a file says that is not of the kind that it should be is absent, not an error.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedserver.dashboard import sound_values
from fedserver.dashboard.activity import Activity, Seen
from fedserver.dashboard.packed_rows import PackedRows
from fedserver.dashboard.run_files import (
    Row,
    Stamp,
    file_stamp,
    lines_from_the_end,
    parsed,
    read_json,
    without_nodes,
)
from fedserver.dashboard.sound_values import sound, sound_nodes, sound_round
from fedserver.live_log import ALIVE, EVENTS, LIVE, state_of

LEDGER, METRICS, SUMMARY, CONTROL = "ledger.db", "metrics.jsonl", "summary.json", "control.db"
REPORT, CHECKPOINT = "report.html", "checkpoint.json"
WATCHED = (LEDGER, f"{LEDGER}-wal", METRICS, SUMMARY, LIVE, EVENTS, CONTROL, f"{CONTROL}-wal")
COLUMNS = "height, kind, round, content, previous, hash, wall, signatures"
# A round's clocks hold those of all its nodes; SQLite finds the one that is wanted in their text.
STARTED = (
    "CASE WHEN json_valid(wall) THEN"
    " coalesce(json_extract(wall, '$.started'), json_extract(wall, '$.applied')) END"
)
WITHOUT_NODES = (
    "CASE WHEN json_valid(content) THEN json_remove(content, '$.nodes') ELSE content END"
)
PAGES_KEPT_KILOBYTES = 256
ROUNDS_OF_NODES = 8
"""Of this many of the last rounds a node's part is remembered, however long the run."""

Found = TypeVar("Found")


@dataclass
class Past:
    """A node in the rounds so far: the last in which it was accepted and in which anything came from it,
    and its newest row."""

    accepted: int | None = None
    heard: int | None = None
    row: Row = field(default_factory=dict)

    def take_older(self, number: int, node: Row) -> None:
        """Take in its row of a round before those that were taken in."""
        if self.accepted is None and node["verdict"] == "accepted":
            self.accepted = number
        if self.heard is None and node["verdict"] != "missing":
            self.heard = number
        if not self.row or (self.row["verdict"] == "late" and node["verdict"] != "late"):
            self.row = node


class RunReader:
    """A run folder; ``identity`` is its name in addresses."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity
        self._lock = threading.RLock()
        self._cache: dict[str, tuple[Any, Any]] = {}
        self._activity: Activity | None = None

    def stamp(self) -> tuple[Stamp | None, ...]:
        """Changes whenever anything that is shown may have changed."""
        return tuple(file_stamp(self.folder / name) for name in WATCHED)

    def live(self) -> Row:
        """``live.json``, with the state that it is in now."""
        found: Row = dict(self._json(LIVE))
        return sound(found | {"state": state_of(found)}, sound_values.LIVE) if found else found

    def summary(self) -> Row:
        """``summary.json``, empty until the run has finished."""
        return sound(self._json(SUMMARY), sound_values.SUMMARY)

    def losses(self) -> tuple[float | None, float | None]:
        """Loss of the base model, and the newest evaluation, of a run that has no summary yet.

        They are read from the first round's entry and the end of the metrics, whatever their length, and
        are of all nodes; a summary compares those that evaluated both models.
        """
        with self._ledger() as database:
            found = database.execute(
                "SELECT json_extract(content, '$.entering.loss_sum'),"
                " json_extract(content, '$.entering.tokens')"
                " FROM entries WHERE kind = 'round' ORDER BY height LIMIT 1"
            ).fetchone()
        total, tokens = found or (None, None)
        before = (
            total / tokens
            if sound_values.number(total) and sound_values.number(tokens) and tokens
            else None
        )
        for line in lines_from_the_end(self.folder / METRICS):
            newest = without_nodes(line).get("eval_loss")
            if sound_values.number(newest):
                return before, newest
        return before, None

    def rounds(self) -> list[Row]:
        """The rounds in order, without their nodes."""
        return self._cached("rounds", file_stamp(self.folder / METRICS), self._read_rounds)

    def recent_nodes(self) -> dict[int, list[Row]]:
        """Round -> rows of its nodes, of the last rounds."""
        return self._cached("nodes", file_stamp(self.folder / METRICS), self._read_nodes)

    def genesis(self) -> Row:
        """Content of the first entry: configuration, base digest, layout. Empty where there is none."""
        found = self._cached("genesis", self._exists(LEDGER), self._read_genesis)
        if not found:
            self._cache.pop("genesis", None)
        return found

    def configuration(self) -> Row:
        """What decides the run's numbers, as the ledger has it."""
        found = self.genesis().get("configuration")
        return found if isinstance(found, dict) else {}

    def entry(self, kind: str, number: int) -> Row | None:
        """The newest ledger entry of a kind and round: its columns, JSON texts parsed."""
        with self._ledger() as database:
            row = database.execute(
                f"SELECT {COLUMNS} FROM entries"
                " WHERE kind = ? AND round = ? ORDER BY height DESC LIMIT 1",
                (kind, number),
            ).fetchone()
        return None if row is None else _entry(row)

    def round_entry(self, number: int) -> Row | None:
        """The newest entry of a round, without the rows of its nodes."""
        with self._ledger() as database:
            row = database.execute(
                f"SELECT {COLUMNS.replace('content', WITHOUT_NODES)} FROM entries"
                " WHERE kind = 'round' AND round = ? ORDER BY height DESC LIMIT 1",
                (number,),
            ).fetchone()
        return None if row is None else _entry(row)

    def round_nodes(self, number: int) -> Sequence[Row]:
        """The rows of a round's nodes as its entry has them; those that were asked for last are kept,
        for as long as the ledger stays as it is."""
        key = (number, self.head())
        return self._cached("round_nodes", key, lambda: self._read_round_nodes(number))

    def signed_updates(self, number: int) -> tuple[int, int]:
        """How many updates of a round are signed, and how many there are; without parsing it."""
        with self._ledger() as database:
            row = database.execute(
                "SELECT content, signatures FROM entries WHERE kind = 'round' AND round = ?",
                (number,),
            ).fetchone()
        if row is None:
            return 0, 0
        # Quotes inside of texts are escaped in canonical JSON, so that a name cannot be counted.
        return len(parsed(row[1].encode())), row[0].count('"update":"')

    def round_times(self, numbers: Collection[int]) -> dict[int, float]:
        """When each of these rounds began, in seconds since 1970."""
        with self._ledger() as database:
            rows = database.execute(
                f"SELECT round, {STARTED} FROM entries WHERE kind = 'round' AND round IN"
                f" ({', '.join(str(int(number)) for number in numbers)})"
            ).fetchall()
        return dict(rows)

    def entries(self) -> list[Row]:
        """Height, kind, round, hash, previous hash and size of all entries, newest first."""
        # With the files' stamps, so that a change in the midst of the chain is seen.
        stamps = (file_stamp(self.folder / name) for name in (LEDGER, f"{LEDGER}-wal"))
        return self._cached("entries", (self.head(), *stamps), self._read_entries)

    def operator_entries(self) -> list[Row]:
        """Recorded actions of operators, oldest first."""
        return self._cached("operator", self.head(), self._read_operator)

    def sealing_key(self) -> str | None:
        """The public key that the checkpoint names as its maker's; verifying checks that it is so."""
        signatures: Any = self._json(CHECKPOINT).get("signatures")
        try:
            return str(signatures[0]["keyid"])
        except (LookupError, TypeError):
            return None

    def head(self) -> str | None:
        """Hash of the chain's last entry; None of no ledger.

        Asked for every time, and what is kept of the ledger is kept by it, not by the files' stamps: a
        write-ahead log is used again and again, so that an entry which was looked for while it was
        written may leave its size and its time as they were.
        """
        with self._ledger() as database:
            row = database.execute(
                # The sign makes SQLite search the hashes' index: in the table an entry's hash stands
                # behind its content, which may be of megabytes.
                "SELECT hash FROM entries ORDER BY +height DESC LIMIT 1"
            ).fetchone()
        return None if row is None else str(row[0])

    def evaluations(self) -> list[Row]:
        """Bytes and seconds of the messages that evaluate the model at the end, by ledger entry."""
        return self._cached("evaluations", self.head(), self._read_evaluations)

    def reported(self) -> bool:
        """Whether there is a report of the run as it stands, not of an earlier stop."""
        report, metrics = file_stamp(self.folder / REPORT), file_stamp(self.folder / METRICS)
        alive = self.live().get("state") in ALIVE
        return report is not None and not alive and (metrics is None or report[0] >= metrics[0])

    def past(self, names: Collection[str]) -> dict[str, Past]:
        """Of nodes that no round asks any more: where they were last heard and accepted, however long
        ago."""
        key = (file_stamp(self.folder / METRICS), frozenset(names))
        return self._cached("past", key, lambda: self._read_past(names))

    def height(self) -> int:
        """Number of ledger entries."""
        with self._ledger() as database:
            return int(database.execute("SELECT COUNT(*) FROM entries").fetchone()[0])

    def activity(self) -> Seen:
        """The round that is running, up to the last event."""
        with self._lock:
            live = self.live()
            key = (live.get("process"), live.get("started"))
            if self._activity is None or self._activity.key != key:
                self._activity = Activity(self.folder / EVENTS, live, key)
            self._activity.advance(live)
            return self._activity.seen()

    def log(
        self,
        words: str,
        limit: int,
        shown: Callable[[Row], str] = lambda event: "",
        span: int = 1 << 24,
    ) -> tuple[list[Row], bool]:
        """The newest events that hold all of the words, newest first; whether there may be more.

        A word may stand in a value of the event or in what is ``shown`` of it. At most the last
        ``span`` bytes are searched, a hundred thousand events.
        """
        wanted = words.casefold().split()

        def holds(event: Row) -> bool:
            text = " ".join([shown(event), *map(str, event.values())]).casefold()
            return all(word in text for word in wanted)

        found: list[Row] = []
        path = self.folder / EVENTS
        for line in lines_from_the_end(path, span):
            value = parsed(line)
            if not value or value.get("event") == "node_progress":
                continue
            if wanted and not holds(value):
                continue
            if len(found) == limit:
                return found, True
            found.append(value)
        return found, (file_stamp(path) or (0, 0, 0))[1] > span

    def _read_round_nodes(self, number: int) -> Sequence[Row]:
        # SQLite cuts them apart, so that the whole round is never held as dictionaries.
        with self._ledger() as database:
            rows = database.execute(
                "SELECT value FROM (SELECT content FROM entries WHERE kind = 'round' AND round = ?"
                " AND json_valid(content) ORDER BY height DESC LIMIT 1),"
                " json_each(content, '$.nodes')",
                (number,),
            )
            return PackedRows([text.encode() for (text,) in rows])

    def _read_rounds(self) -> list[Row]:
        found: dict[int, Row] = {}
        try:
            with (self.folder / METRICS).open("rb") as file:
                for line in file:
                    row = without_nodes(line)
                    if sound_values.count(row.get("round")):
                        found[row["round"]] = sound_round(row)
        except OSError:
            return []
        return [found[number] for number in sorted(found)]

    def _read_nodes(self) -> dict[int, list[Row]]:
        found: dict[int, list[Row]] = {}
        for line in lines_from_the_end(self.folder / METRICS):
            row = parsed(line)
            if sound_values.count(row.get("round")):
                found.setdefault(row["round"], sound_nodes(row.get("nodes")))
            # Ten thousand nodes: what a page shows is of the last rounds.
            if len(found) >= ROUNDS_OF_NODES or sum(map(len, found.values())) >= 10_000:
                break
        return found

    def _read_past(self, names: Collection[str]) -> dict[str, Past]:
        found = {name: Past() for name in names}
        wanted = {json.dumps(name).encode(): name for name in names}
        for line in lines_from_the_end(self.folder / METRICS):
            wanted = {text: name for text, name in wanted.items() if found[name].accepted is None}
            if not wanted:
                break
            if not any(text in line for text in wanted):
                continue
            row = parsed(line)
            nodes = sound_nodes(row.get("nodes")) if sound_values.count(row.get("round")) else ()
            for node in nodes:
                if node["node"] in found:
                    found[node["node"]].take_older(row["round"], node)
        return found

    def _read_evaluations(self) -> list[Row]:
        with self._ledger() as database:
            rows = database.execute(
                f"SELECT {COLUMNS} FROM entries WHERE kind IN ('evaluation', 'ablation')"
            ).fetchall()
        found = []
        for entry in map(_entry, rows):
            nodes = entry["content"].get("nodes") or ()
            sums = {key: sum(node[key] for node in nodes) for key in ("bytes_up", "bytes_down")}
            found.append(sums | {"seconds": entry["wall"].get("seconds") or 0.0})
        return found

    def _read_genesis(self) -> Row:
        with self._ledger() as database:
            row = database.execute(
                "SELECT content FROM entries WHERE kind = 'genesis' LIMIT 1"
            ).fetchone()
        return parsed(row[0].encode()) if row else {}

    def _read_entries(self) -> list[Row]:
        with self._ledger() as database:
            rows = database.execute(
                "SELECT height, kind, round, hash, previous, length(content),"
                f" {STARTED} FROM entries ORDER BY height DESC"
            ).fetchall()
        keys = ("height", "kind", "round", "hash", "previous", "content_bytes", "time")
        return [dict(zip(keys, row, strict=True)) for row in rows]

    def _read_operator(self) -> list[Row]:
        with self._ledger() as database:
            rows = database.execute(
                f"SELECT {COLUMNS} FROM entries WHERE kind = 'operator' ORDER BY height"
            ).fetchall()
        return [_entry(row) for row in rows]

    @contextmanager
    def _ledger(self) -> Iterator[sqlite3.Connection]:
        """The ledger, read-only; an empty one where there is none."""
        path = self.folder / LEDGER
        address = f"{path.resolve().as_uri()}?mode=ro"
        if not path.is_file():
            address = ":memory:"
        elif not os.access(self.folder, os.W_OK):
            # Without a shared-memory file SQLite refuses a WAL database that it may not write to.
            address += "&immutable=1"
        with closing(sqlite3.connect(address, uri=address != ":memory:", timeout=10)) as database:
            try:
                # Entries are read once, from end to end: what SQLite would keep of them is never used.
                database.execute(f"PRAGMA cache_size = -{PAGES_KEPT_KILOBYTES}")
                # A ledger of an earlier version has no seals, until it is migrated.
                if not database.execute(
                    "SELECT 1 FROM pragma_table_info('entries') WHERE name = 'seal'"
                ).fetchone():
                    raise sqlite3.DatabaseError
            except sqlite3.DatabaseError:
                database.close()
                with closing(sqlite3.connect(":memory:")) as empty:
                    empty.execute(f"CREATE TABLE entries ({COLUMNS}, seal)")
                    yield empty
                return
            yield database

    def _json(self, name: str) -> Row:
        path = self.folder / name
        return self._cached(name, file_stamp(path), lambda: read_json(path))

    def _exists(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def _cached(self, name: str, stamp: Any, read: Callable[[], Found]) -> Found:
        with self._lock:
            held = self._cache.get(name)
            if held is None or held[0] != stamp:
                held = (stamp, read())
                self._cache[name] = held
            found: Found = held[1]
            return found


def settled(live: Row, summary: Row) -> Row:
    """A run's summary where it is of the run as it stands; nothing of one that has gone on since.

    Its sums are those of the ledger, without opening it.
    """
    going = live.get("state") in (*ALIVE, "interrupted")
    return (
        {}
        if going or summary.get("rounds") != live.get("committed", summary.get("rounds"))
        else summary
    )


def _entry(row: tuple[Any, ...]) -> Row:
    height, kind, number, content, previous, digest, wall, signatures = row
    return {
        "height": height,
        "kind": kind,
        "round": number,
        "content": parsed(content.encode()),
        "previous": previous,
        "hash": digest,
        "wall": parsed(wall.encode()),
        "signatures": parsed(signatures.encode()),
    }
