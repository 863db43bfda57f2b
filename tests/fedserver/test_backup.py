"""A backup, taken at any moment, becomes a sound folder again or none at all."""

from __future__ import annotations

import io
import json
import random
import shutil
import stat
import tarfile
import threading
from pathlib import Path

import pytest

from aggregators.keys import load, public_hex
from fedserver.backup import MANIFEST, back_up, restore
from fedserver.ledger import Arrival, Ledger, LedgerError
from fedserver.sealing import server_key_file
from simulations.benchmarks.ledger import fill


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    fill(folder, 6, 2)
    ledger = Ledger(folder, write=True)
    blob = ledger.put(b"of the open round")
    ledger.arrive(Arrival("a" * 16, 7, "node-0", "b" * 64, blob, None, 1.5))
    ledger.close()
    (folder / "scenario.toml").write_text("rounds = 9\n")
    return folder


def test_what_is_restored_is_what_was(run_folder: Path, tmp_path: Path) -> None:
    made = back_up(run_folder, tmp_path / "run.tar", keys=True)
    found = restore(tmp_path / "run.tar", tmp_path / "again")
    assert made == found
    before, after = Ledger(run_folder), Ledger(tmp_path / "again", write=True)
    assert after.verify() == []
    assert list(after.entries()) == list(before.entries())
    assert after.arrivals() == before.arrivals()
    assert all(after.get(one.blob) for one in after.arrivals().values())
    assert (tmp_path / "again" / "scenario.toml").read_text() == "rounds = 9\n"
    after.append("note", 7, {}, {})
    assert after.verify() == []
    before.close()
    after.close()


def test_keys_stay_unless_they_are_asked_for(run_folder: Path, tmp_path: Path) -> None:
    back_up(run_folder, tmp_path / "open.tar")
    restore(tmp_path / "open.tar", tmp_path / "open")
    assert not list((tmp_path / "open").rglob("*.pem"))
    with pytest.raises(LedgerError, match="key"):
        Ledger(tmp_path / "open", write=True)
    Ledger(tmp_path / "open", write=True, key_file=server_key_file(run_folder)).close()
    back_up(run_folder, tmp_path / "safe.tar", keys=True)
    restore(tmp_path / "safe.tar", tmp_path / "safe")
    for path in (tmp_path / "safe.tar", server_key_file(tmp_path / "safe")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_backup_during_a_run_is_one_moment_of_it(tmp_path: Path) -> None:
    """Entries are appended, states deleted and checkpoints written all the while."""
    folder = tmp_path / "run"
    key = fill(folder, 2)
    over = threading.Event()

    def run() -> None:
        ledger = Ledger(folder, write=True)
        number = 3
        while not over.is_set():
            blob = ledger.put(b"update %d" % number)
            state = ledger.put(b"state %d" % number)
            content = {"nodes": [{"node": "a", "update": blob}], "state": state}
            ledger.append("round", number, content, {})
            ledger.keep_states({state})
            number += 1
        ledger.close()

    writer = threading.Thread(target=run)
    writer.start()
    try:
        made = [back_up(folder, tmp_path / f"{n}.tar") for n in range(8)]
    finally:
        over.set()
        writer.join()
    assert len({one.entries for one in made}) > 1
    for number, one in enumerate(made):
        assert restore(tmp_path / f"{number}.tar", tmp_path / str(number), key=key) == one
        ledger = Ledger(tmp_path / str(number))
        assert ledger.verify(state=False, key=key) == []
        assert (ledger.height, ledger.head) == (one.entries, one.head)
        ledger.close()
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_backup_makes_no_folder(run_folder: Path, tmp_path: Path) -> None:
    back_up(run_folder, tmp_path / "run.tar")
    whole = (tmp_path / "run.tar").read_bytes()
    used = len(whole.rstrip(b"\0"))
    chance = random.Random(4)
    damaged = [whole[:cut] for cut in (0, 1, 700, used // 2, used - 600)]
    with tarfile.open(tmp_path / "run.tar") as archive:
        places = [(m.offset_data, m.size) for m in archive if m.name != MANIFEST]
    for offset, size in places:
        changed = bytearray(whole)
        changed[offset + chance.randrange(size)] ^= 1 << chance.randrange(8)
        damaged.append(bytes(changed))
    for content in damaged:
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(LedgerError, match=r"bad\.tar"):
            restore(tmp_path / "bad.tar", tmp_path / "again")
        assert not (tmp_path / "again").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run.tar", "bad.tar"}


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/outside", "blobs/../../outside", "keys/../outside.pem", "other"]
)
def test_a_backup_cannot_write_elsewhere(run_folder: Path, tmp_path: Path, name: str) -> None:
    back_up(run_folder, tmp_path / "run.tar")
    with tarfile.open(tmp_path / "run.tar", "a") as archive:
        member = tarfile.TarInfo(name)
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    with pytest.raises(LedgerError, match="no place"):
        restore(tmp_path / "run.tar", tmp_path / "again")
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        link = tarfile.TarInfo("ledger.db")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(LedgerError, match="no place"):
        restore(tmp_path / "link.tar", tmp_path / "again")


def test_a_forged_backup_is_refused(run_folder: Path, tmp_path: Path) -> None:
    """Its files fit its manifest, and its ledger the seals of another key."""
    other = tmp_path / "other"
    fill(other, 6, 2)
    back_up(other, tmp_path / "other.tar")
    known = public_hex(load(server_key_file(run_folder)))
    with pytest.raises(LedgerError, match="not restored"):
        restore(tmp_path / "other.tar", tmp_path / "again", key=known)
    restore(
        tmp_path / "other.tar", tmp_path / "again", key=public_hex(load(server_key_file(other)))
    )


def test_places_that_are_taken(run_folder: Path, tmp_path: Path) -> None:
    back_up(run_folder, tmp_path / "run.tar")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("kept")
    for place in (tmp_path / "taken", tmp_path / "run.tar"):
        with pytest.raises(LedgerError, match="not empty"):
            restore(tmp_path / "run.tar", place)
    (tmp_path / "empty").mkdir()
    restore(tmp_path / "run.tar", tmp_path / "empty")


def test_a_run_with_a_lost_update_is_not_backed_up(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    ledger = Ledger(tmp_path / "run")
    entry = ledger.last("round")
    assert entry is not None
    ledger.forget(entry.content["nodes"][0]["update"])
    ledger.close()
    with pytest.raises(LedgerError, match="missing"):
        back_up(tmp_path / "run", tmp_path / "run.tar")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_from_the_command_line(run_folder: Path, tmp_path: Path) -> None:
    import typer
    from typer.testing import CliRunner

    from fedserver.backup_command import add_backup_commands

    app = typer.Typer()
    add_backup_commands(app)
    run = CliRunner().invoke
    file, again = str(tmp_path / "run.tar"), str(tmp_path / "again")
    assert run(app, ["backup", str(run_folder), file]).exit_code == 0
    known = public_hex(load(server_key_file(run_folder)))
    made = run(app, ["restore", file, again, "--key", known])
    assert made.exit_code == 0
    assert "private key" in made.stdout
    with tarfile.open(file) as archive:
        content = archive.extractfile(MANIFEST)
        assert content is not None
        assert json.loads(content.read())["keys"] is False
