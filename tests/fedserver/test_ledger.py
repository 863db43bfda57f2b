"""The ledger is append-only, tamper-evident, and whole or absent after a kill at any moment."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedserver.ledger import GENESIS_PREVIOUS, Ledger, LedgerError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _round(ledger: Ledger, number: int) -> None:
    blob = ledger.put(f"update {number}".encode())
    state = ledger.put(f"state {number}".encode())
    content = {"nodes": [{"node": "a", "update": blob, "reason": ""}], "state": state}
    ledger.append("round", number, content, {"seconds": 0.5 * number})


def filled(folder: Path) -> Ledger:
    ledger = Ledger(folder, create=True)
    for number in range(3):
        _round(ledger, number)
    return ledger


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=3), max_size=5))
def test_what_is_appended_is_read_back_and_decides_the_head(
    tmp_path_factory: pytest.TempPathFactory, contents: list[dict[str, object]]
) -> None:
    heads = []
    for wall in (1.0, 2.0):
        ledger = Ledger(tmp_path_factory.mktemp("run"), create=True)
        for number, content in enumerate(contents):
            ledger.append("note", number, content, {"at": wall})
        assert [entry.content for entry in ledger.entries()] == contents
        heads.append(ledger.head)
        ledger.close()
    assert heads[0] == heads[1]


def test_order_and_content_change_the_head(tmp_path: Path) -> None:
    heads = set()
    for name, order in (("x", (1, 2)), ("y", (2, 1)), ("z", (1, 3))):
        ledger = Ledger(tmp_path / name, create=True)
        for number in order:
            ledger.append("note", 0, {"value": number}, {})
        heads.add(ledger.head)
        ledger.close()
    assert len(heads) == 3


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET content = replace(content, 'a', 'b') WHERE height = 1",
        "UPDATE entries SET round = 7 WHERE height = 1",
        "UPDATE entries SET kind = 'other' WHERE height = 0",
        "DELETE FROM entries WHERE height = 1",
        "DELETE FROM entries WHERE height = 0",
        "DELETE FROM entries",
    ],
)
def test_tampering_with_the_database_is_found(tmp_path: Path, statement: str) -> None:
    ledger = Ledger(tmp_path, create=True)
    for number in range(3):
        _round(ledger, number)
    assert ledger.verify() == []
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        database.execute(statement)
    changed = Ledger(tmp_path)
    assert changed.verify()
    changed.close()


def test_a_changed_or_lost_blob_is_found(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, create=True)
    _round(ledger, 1)
    digest = ledger.put(b"update 1")
    path = next((tmp_path / "blobs").glob(f"*/{digest}*"))
    path.write_bytes(b"forged")
    assert "changed" in ledger.verify()[0]
    path.unlink()
    assert "missing" in ledger.verify()[0]
    ledger.close()


@pytest.mark.parametrize("content", ["no json", "[]", '{"nodes": 3}', '{"nodes": [{"update": 1}]}'])
def test_content_that_cannot_be_read_is_a_problem_and_no_crash(
    tmp_path: Path, content: str
) -> None:
    ledger = filled(tmp_path)
    ledger.close()
    database = sqlite3.connect(tmp_path / "ledger.db")
    database.execute("UPDATE entries SET content = ? WHERE height = 1", (content,))
    database.commit()
    database.close()
    ledger = Ledger(tmp_path)
    assert any("entry 1" in problem for problem in ledger.verify())
    if content == "no json":
        with pytest.raises(LedgerError, match="entry 1"):
            list(ledger.entries())
    ledger.close()


def test_a_damaged_database_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    ledger.close()
    path = tmp_path / "ledger.db"
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(bytes(data))
    ledger = Ledger(tmp_path)
    assert any("cannot be read" in problem for problem in ledger.verify())
    with pytest.raises(LedgerError, match="cannot be read"):
        list(ledger.entries())
    ledger.close()


def test_entries_missing_at_the_end_are_found_by_the_summary(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"head": ledger.head}))
    assert ledger.verify() == []
    ledger.close()
    database = sqlite3.connect(tmp_path / "ledger.db")
    database.execute("DELETE FROM entries WHERE height = (SELECT MAX(height) FROM entries)")
    database.commit()
    database.close()
    ledger = Ledger(tmp_path)
    assert any("missing at its end" in problem for problem in ledger.verify())
    ledger.close()


def test_two_writers_exclude_each_other_and_readers_do_not(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    for options in ({"create": True}, {"write": True}):
        with pytest.raises(LedgerError, match="another process"):
            Ledger(tmp_path, **options)
    reader = Ledger(tmp_path)
    assert reader.verify() == []
    reader.close()
    ledger.close()
    again = Ledger(tmp_path, write=True)
    _round(again, 9)
    again.close()


def test_an_entry_follows_the_one_that_its_writer_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks do not work, as on some network disks, a second writer is still found out."""
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    one = filled(tmp_path)
    two = Ledger(tmp_path, write=True)
    _round(two, 7)
    two.close()
    with pytest.raises(LedgerError, match="another process"):
        _round(one, 8)
    assert one.verify() == []
    one.close()


def test_only_the_wanted_states_stay(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, create=True)
    for number in range(4):
        _round(ledger, number)
    states = [entry.content["state"] for entry in ledger.entries("round")]
    ledger.keep_states(set(states[2:]))
    assert [ledger.has(state) for state in states] == [False, False, True, True]
    assert ledger.verify() == []
    ledger.close()


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger"):
        Ledger(tmp_path)
    (tmp_path / "ledger.db").write_bytes(b"not a database, but long enough to be looked at" * 9)
    with pytest.raises(LedgerError, match="cannot be read"):
        Ledger(tmp_path)


def test_values_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, create=True)
    with pytest.raises(ValueError, match="JSON"):
        ledger.append("note", 0, {"value": float("nan")}, {})
    assert ledger.head == GENESIS_PREVIOUS
    ledger.close()


WRITER = """
import sys
from pathlib import Path
from fedserver.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), create=True)
last = ledger.last("round")
print("ready", flush=True)
for number in range(0 if last is None else last.round + 1, 1000):
    blob = ledger.put(b"update %d" % number)
    ledger.append("round", number, {"nodes": [{"update": blob}], "state": blob}, {})
    print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_rounds(tmp_path: Path) -> None:
    chance = random.Random(5)
    written = -1
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ},
        )
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 6)):
            line = process.stdout.readline()
            if line.strip().isdigit():
                written = int(line)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        ledger = Ledger(tmp_path)
        assert ledger.verify() == []
        rounds = [entry.round for entry in ledger.entries("round")]
        assert rounds == list(range(len(rounds)))
        assert len(rounds) > written
        ledger.close()


def test_a_full_disk_loses_nothing_that_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path, create=True)
    _round(ledger, 1)
    head = ledger.head

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(LedgerError, match="free some space"):
            ledger.put(b"does not fit")
    assert ledger.head == head
    assert ledger.verify() == []
    assert not list((tmp_path / "blobs").glob("*/*.part"))
    _round(ledger, 2)
    assert ledger.verify() == []
    ledger.close()


def test_a_database_that_cannot_grow_is_a_clear_message(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, create=True)
    _round(ledger, 1)
    head = ledger.head
    # SQLite's own limit stands for a full disk: the insert fails half-way and is rolled back.
    ledger._database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(LedgerError, match="--resume"):
        ledger.append("round", 2, {"note": "x" * 100_000}, {})
    assert ledger.head == head
    ledger.close()
