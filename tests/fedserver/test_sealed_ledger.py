"""Seals: what the hash leaves out is covered, the end cannot be cut off, proofs need no ledger."""

from __future__ import annotations

import base64
import json
import random
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregators.keys import load_or_create, public_hex
from fedserver.checkpoint import FILE, read_checkpoint
from fedserver.entry import canonical, entry_hash
from fedserver.inclusion import ProofError, check, prove
from fedserver.ledger import Ledger, LedgerError
from fedserver.ledger_command import ledger_app
from fedserver.sealing import server_key_file
from fedserver.statements import SealError, open_seal
from simulations.benchmarks.ledger import fill, survey

NODES = 3


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A ledger of 9 rounds of three signing nodes, and the server's public key."""
    folder = tmp_path_factory.mktemp("run") / "sealed"
    return folder, fill(folder, 9, NODES)


def problems(folder: Path, key: str | None = None) -> list[str]:
    ledger = Ledger(folder)
    try:
        return ledger.verify(key=key)
    finally:
        ledger.close()


def test_random_changes_are_found(tmp_path: Path) -> None:
    made, missed = survey(150, 3, tmp_path / "run")
    assert missed == []
    assert made.total() == 150
    assert set(made) == {"flip", "reorder", "swap", "truncate", "remove", "fork", "unsign"}


def test_a_seal_is_an_in_toto_statement_that_others_can_read(sealed: tuple[Path, str]) -> None:
    folder, key = sealed
    ledger = Ledger(folder)
    entry = ledger.last("round")
    assert entry is not None
    envelope = json.loads(entry.seal)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert envelope["signatures"][0]["keyid"] == key
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"][0]["digest"] == {"sha256": entry.hash}
    assert statement["predicate"]["height"] == entry.height
    ledger.close()


@pytest.mark.parametrize("kept", range(10))
def test_any_end_that_is_cut_off_is_missed(
    sealed: tuple[Path, str], tmp_path: Path, kept: int
) -> None:
    """Also for a reader who knows no key, and for a server that would go on."""
    shutil.copytree(sealed[0], tmp_path / "run")
    database = sqlite3.connect(tmp_path / "run" / "ledger.db")
    with database:
        database.execute("DELETE FROM entries WHERE height >= ?", (kept,))
    database.close()
    assert bool(problems(tmp_path / "run")) == (kept < 9)
    if kept < 9:
        with pytest.raises(LedgerError, match="missing"):
            Ledger(tmp_path / "run", write=True)


def test_a_checkpoint_may_be_one_entry_behind_and_catches_up(tmp_path: Path) -> None:
    """The server may die between an entry and its checkpoint."""
    folder = tmp_path / "run"
    fill(folder, 3)
    before = read_checkpoint(folder)
    ledger = Ledger(folder, write=True)
    ledger.append("note", 4, {"nodes": []}, {})
    ledger.close()
    (folder / FILE).write_text(before)
    assert problems(folder) == []
    Ledger(folder, write=True).close()
    assert open_seal(read_checkpoint(folder)).predicate["entries"] == 4
    (folder / FILE).unlink()
    assert problems(folder)
    with pytest.raises(LedgerError, match="missing"):
        Ledger(folder, write=True)


def test_a_run_that_goes_on_while_it_is_verified_lacks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    fill(folder, 3)
    running, reading = Ledger(folder, write=True), Ledger(folder)
    read = reading.blobs.get

    def get(digest: str) -> bytes:
        running.append("note", 4, {"nodes": []}, {})
        return read(digest)

    monkeypatch.setattr(reading.blobs, "get", get)
    assert reading.verify() == []
    assert running.height > 3
    running.close()
    reading.close()


def test_a_history_sealed_by_another_key_needs_the_key_to_be_known(
    sealed: tuple[Path, str], tmp_path: Path
) -> None:
    folder, key = tmp_path / "run", sealed[1]
    other = fill(folder, 9, NODES)
    assert problems(folder) == []
    assert problems(folder, other) == []
    assert problems(folder, key)


def test_the_key_may_lie_elsewhere(tmp_path: Path) -> None:
    folder, key_file = tmp_path / "run", tmp_path / "safe" / "server.pem"
    ledger = Ledger(folder, create=True, key_file=key_file)
    ledger.append("note", 0, {}, {})
    ledger.close()
    assert not server_key_file(folder).exists()
    assert problems(folder) == problems(folder, public_hex(load_or_create(key_file))) == []
    with pytest.raises(LedgerError, match="key"):
        Ledger(folder, write=True)
    Ledger(folder, write=True, key_file=key_file).close()


# Proofs


def test_a_proof_says_what_the_ledger_says(sealed: tuple[Path, str]) -> None:
    folder, key = sealed
    ledger = Ledger(folder)
    for entry in ledger.entries():
        for row in entry.content["nodes"]:
            proven = check(prove(ledger, row["node"], entry.round).encode(), key)
            assert (proven.node, proven.round, proven.update, proven.verdict) == (
                row["node"], entry.round, row["update"], "accepted"
            )  # fmt: skip
            assert (proven.height, proven.entries, proven.head) == (entry.height, 9, ledger.head)
    for node, number in (("stranger", 1), ("node-1", 10), ("node-1", 0)):
        with pytest.raises(LedgerError, match="no round"):
            prove(ledger, node, number)
    ledger.close()


@given(data=st.data())
def test_one_bit_of_a_proof(sealed: tuple[Path, str], data: st.DataObject) -> None:
    folder, key = sealed
    ledger = Ledger(folder)
    proof = bytearray(prove(ledger, "node-1", 5).encode())
    ledger.close()
    honest = check(bytes(proof), key)
    at = data.draw(st.integers(0, 8 * len(proof) - 1))
    proof[at // 8] ^= 1 << at % 8
    try:
        found = check(bytes(proof), key)
    except ProofError:
        return
    # A bit may name another node of the same entry, and then proves what is true of that one.
    assert found.node != honest.node
    assert replace(found, node=honest.node, update=honest.update) == honest


def test_proofs_of_what_never_was(sealed: tuple[Path, str]) -> None:
    folder, key = sealed
    ledger = Ledger(folder)
    honest = json.loads(prove(ledger, "node-1", 5))
    ledger.close()

    def refused(**changes: object) -> bool:
        with pytest.raises(ProofError):
            check(canonical({**honest, **changes}).encode(), key)
        return True

    height, kind, number, content, previous = honest["entry"]
    lie = content.replace('"accepted"', '"forged"')
    assert refused(entry=[height, kind, number, lie, previous])
    # A tree of one leaf, whose root is the lie's: the checkpoint is not of that tree.
    assert entry_hash(height, kind, number, lie, previous)
    assert refused(entry=[0, kind, number, lie, previous], path=[])
    assert refused(path=honest["path"][:-1])
    assert refused(checkpoint="")
    assert refused(checkpoint={"payload": 3})
    assert refused(node="stranger")
    assert refused(round=4)
    with pytest.raises(ProofError, match="key"):
        check(canonical(honest).encode(), "0" * 64)
    for rubbish in (b"", b"null", b"[]", b"\xff", b"[" * 100_000):
        with pytest.raises(ProofError):
            check(rubbish, key)


@given(st.text(max_size=30) | st.sampled_from(["[" * 100_000, '{"payload":"e30="}']))
def test_what_is_no_seal_cannot_be_opened(text: str) -> None:
    with pytest.raises(SealError):
        open_seal(text)


# Commands, from the ledger to a device that has none of it


def test_prove_and_check_from_the_command_line(sealed: tuple[Path, str], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    folder, key = sealed
    run = CliRunner().invoke
    proof, public = tmp_path / "proof.json", tmp_path / "server.pub"
    public.write_text(run(ledger_app, ["key", str(folder)]).stdout)
    assert public.read_text().strip() == key
    made = run(
        ledger_app, ["prove", str(folder), "--node", "node-2", "--round", "7", "--to", str(proof)]
    )
    assert made.exit_code == 0
    for given_key in (key, str(public)):
        assert run(ledger_app, ["check", str(proof), "--key", given_key]).exit_code == 0
    found = run(ledger_app, ["check", str(proof), "--key", "0" * 64, "--json"])
    assert found.exit_code == 1
    assert json.loads(found.stdout)["proven"] is False
    assert run(ledger_app, ["verify", str(folder), "--key", key]).exit_code == 0
    assert run(ledger_app, ["verify", str(folder), "--key", "0" * 64]).exit_code == 1


# Versions

OLD_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    height   INTEGER PRIMARY KEY,
    kind     TEXT NOT NULL,
    round    INTEGER NOT NULL,
    content  TEXT NOT NULL,
    previous TEXT NOT NULL,
    hash     TEXT NOT NULL UNIQUE,
    wall     TEXT NOT NULL
) STRICT;
"""


@pytest.fixture
def old(tmp_path: Path) -> tuple[Path, list[tuple[object, ...]]]:
    """A ledger as the first version wrote it, and its rows."""
    folder = tmp_path / "old"
    folder.mkdir()
    database = sqlite3.connect(folder / "ledger.db")
    database.executescript(OLD_SCHEMA)
    rows: list[tuple[object, ...]] = []
    previous = "0" * 64
    chance = random.Random(1)
    for height in range(12):
        content = canonical({"nodes": [], "value": chance.random()})
        digest = entry_hash(height, "note", height, content, previous)
        rows.append((height, "note", height, content, previous, digest, '{"seconds":1.5}'))
        previous = digest
    with database:
        database.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    database.close()
    return folder, rows


def test_an_old_ledger_is_brought_forward_once(old: tuple[Path, list[tuple[object, ...]]]) -> None:
    folder, rows = old
    with pytest.raises(LedgerError, match="migrate"):
        Ledger(folder)
    ledger = Ledger(folder, write=True)
    assert ledger.verify() == []
    assert ledger.head == rows[-1][5]
    found = [
        (e.height, e.kind, e.round, canonical(e.content), e.previous, e.hash, canonical(e.wall))
        for e in ledger.entries()
    ]
    assert found == rows
    ledger.append("note", 12, {}, {})
    ledger.close()
    seals = sqlite3.connect(folder / "ledger.db").execute("SELECT seal FROM entries").fetchall()
    Ledger(folder, write=True).close()
    assert problems(folder) == []
    assert sqlite3.connect(folder / "ledger.db").execute("SELECT seal FROM entries").fetchall() == (
        seals
    )


def test_a_migration_that_is_cut_short_begins_anew(
    old: tuple[Path, list[tuple[object, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedserver.sealing import Sealer

    folder, rows = old
    write = Sealer.write_checkpoint

    class Killed(BaseException):
        """The process dies."""

    def before(sealer: Sealer) -> None:
        raise Killed

    def after(sealer: Sealer) -> None:
        write(sealer)
        raise Killed

    for death in (before, after):
        with monkeypatch.context() as patched:
            patched.setattr(Sealer, "write_checkpoint", death)
            with pytest.raises(Killed):
                Ledger(folder, write=True)
        with pytest.raises(LedgerError, match="migrate"):
            Ledger(folder)
    ledger = Ledger(folder, write=True)
    assert ledger.head == rows[-1][5]
    assert ledger.verify() == []
    ledger.close()


def test_a_ledger_of_the_future_is_left_alone(sealed: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(sealed[0], tmp_path / "run")
    database = sqlite3.connect(tmp_path / "run" / "ledger.db")
    database.execute("PRAGMA user_version = 99")
    database.commit()
    database.close()
    for options in ({}, {"write": True}):
        with pytest.raises(LedgerError, match="update fedbraid"):
            Ledger(tmp_path / "run", **options)
