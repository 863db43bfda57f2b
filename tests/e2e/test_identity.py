"""Who sent an update and when it arrived change nothing of what the ledger's head is."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedserver import events
from fedserver.configuration import ConfigurationError, load
from fedserver.ledger import Ledger, LedgerError
from fedserver.replay import replay
from simulations.local_grid import LocalGrid
from simulations.run import ledger_head, simulate

SIGNED = "signatures=required"


def quiet(event: events.Event) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def scenario(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_data_file: Path
) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "tiny.toml"
    nodes = "".join(f'\n[[nodes]]\nname = "{name}"\nlora_r = 2\n' for name in ("a", "b", "c"))
    path.write_text(
        f'base_model = "{tiny_model_folder}"\nrounds = 2\nthreads = 1\nlocal_steps = 1\n'
        f'max_length = 48\nquorum = 2\n[data]\nsource = "{tiny_data_file}"\nheld_out_max = 2\n'
        f"limit_per_node = 12\n{nodes}"
    )
    return path


@pytest.fixture(scope="module")
def unsigned_head(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "unsigned"
    simulate(load(str(scenario)), folder, quiet, samples=0)
    return ledger_head(folder)


def test_signed_runs_have_the_head_of_the_unsigned_one(
    scenario: Path, unsigned_head: str, tmp_path: Path
) -> None:
    heads, keys = set(), set()
    for name in ("one", "two"):
        configuration = load(str(scenario), [SIGNED])
        simulate(configuration, tmp_path / name, quiet, samples=0)
        ledger = Ledger(tmp_path / name)
        assert ledger.verify() == []
        assert all(replayed.equal for replayed in replay(ledger, configuration))
        for entry in ledger.entries():
            updates = {row["update"] for row in entry.content.get("nodes", ()) if row["update"]}
            assert entry.signatures.keys() == updates
            keys |= {signature["key"] for signature in entry.signatures.values()}
        heads.add(ledger.head)
        ledger.close()
    assert heads == {unsigned_head}
    assert len(keys) == 6


@pytest.mark.parametrize("fault", ["nan", "twice"])
def test_what_is_tampered_with_on_its_way_is_a_forgery(
    scenario: Path, tmp_path: Path, fault: str
) -> None:
    configuration = load(str(scenario), [SIGNED, f"nodes.c.fault={fault}", "rounds=1"])
    simulate(configuration, tmp_path / "run", quiet, samples=0)
    ledger = Ledger(tmp_path / "run")
    (round_entry,) = ledger.entries("round")
    found = [row["verdict"] for row in round_entry.content["nodes"] if row["node"] == "c"]
    assert found == {"nan": ["forged"], "twice": ["accepted", "duplicate"]}[fault]
    assert ledger.verify() == []
    ledger.close()


class Stopped(Exception):
    """The server dies."""


def interrupted(
    configuration: Any, folder: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Run and stop once ``after`` training replies of round 2 have arrived; whom that asked."""
    asked: list[int] = []
    push, pull = LocalGrid.push_messages, LocalGrid.pull_messages
    arrived = 0

    def pushing(grid: LocalGrid, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        asked.extend(m.metadata.dst_node_id for m in sent if m.metadata.group_id == "2")
        return push(grid, sent)

    def pulling(grid: LocalGrid, ids: Iterable[str]) -> Iterable[Message]:
        nonlocal arrived
        if arrived == after:
            raise Stopped
        found = list(pull(grid, ids))
        arrived += sum(m.metadata.group_id == "2" for m in found)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(LocalGrid, "push_messages", pushing)
        patched.setattr(LocalGrid, "pull_messages", pulling)
        with pytest.raises(Stopped):
            simulate(configuration, folder, quiet, samples=0)
    return asked


def resumed(configuration: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Continue a run to its end; whom that asked in round 2."""
    asked: list[int] = []
    push = LocalGrid.push_messages

    def pushing(grid: LocalGrid, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        asked.extend(m.metadata.dst_node_id for m in sent if m.metadata.group_id == "2")
        return push(grid, sent)

    with monkeypatch.context() as patched:
        patched.setattr(LocalGrid, "push_messages", pushing)
        simulate(configuration, folder, quiet, resume=True, samples=0)
    return asked


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("overrides", [[], [SIGNED]], ids=["unsigned", "signed"])
def test_what_has_arrived_is_not_asked_for_again(
    scenario: Path,
    unsigned_head: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    overrides: list[str],
) -> None:
    configuration, folder = load(str(scenario), overrides), tmp_path / "run"
    first = interrupted(configuration, folder, after, monkeypatch)
    assert len(first) == 3
    ledger = Ledger(folder)
    assert len(ledger.arrivals()) == after
    assert ledger.verify() == []
    ledger.close()
    again = resumed(configuration, folder, monkeypatch)
    assert sorted(again) == sorted(first)[after:]
    ledger = Ledger(folder)
    assert ledger.head == unsigned_head
    assert ledger.arrivals() == {}
    assert ledger.verify() == []
    ledger.close()


DAMAGES = {
    "blob": "UPDATE arrivals SET blob = hex(zeroblob(32))",
    "signature": "UPDATE arrivals SET signature = replace(signature, '1', '2')",
    "no signature": "UPDATE arrivals SET signature = 'null'",
    "swapped": "UPDATE arrivals SET blob = (SELECT MAX(blob) FROM arrivals)",
}


def test_an_arrival_that_was_changed_on_disk_is_asked_for_again(
    scenario: Path, unsigned_head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration, folder = load(str(scenario), [SIGNED]), tmp_path / "run"
    interrupted(configuration, folder, 2, monkeypatch)
    for name, statement in DAMAGES.items():
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        database = sqlite3.connect(copy / "ledger.db")
        with database:
            database.execute(statement)
        database.close()
        assert len(resumed(configuration, copy, monkeypatch)) >= 2, name
        assert ledger_head(copy) == unsigned_head, name


def test_a_node_keeps_its_key(scenario: Path, tmp_path: Path) -> None:
    """Another key under a name that has signed is somebody else, and stays out."""
    configuration, folder = load(str(scenario), [SIGNED, "rounds=1"]), tmp_path / "run"
    simulate(configuration, folder, quiet, samples=0)
    (folder / "keys" / "nodes" / "1.pem").unlink()
    said: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            said.append(event.text)

    later = configuration.model_copy(update={"rounds": 2})
    simulate(later, folder, listen, resume=True, samples=0)
    assert any("'b'" in text and "known by" in text for text in said)
    ledger = Ledger(folder)
    last = ledger.last("round")
    assert last is not None
    assert {row["node"] for row in last.content["nodes"]} == {"a", "c"}
    assert ledger.verify() == []
    ledger.close()


def test_a_ledger_goes_on_under_its_own_key_alone(scenario: Path, tmp_path: Path) -> None:
    configuration, folder = load(str(scenario), ["rounds=1"]), tmp_path / "run"
    simulate(configuration, folder, quiet, samples=0)
    for path in (tmp_path / "other.pem", folder / "keys" / "missing.pem"):
        with pytest.raises(LedgerError, match="key"):
            Ledger(folder, write=True, key_file=path)
    Ledger(folder, write=True).close()


def test_required_signatures_need_keys(scenario: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="keys"):
        simulate(load(str(scenario), [SIGNED]), tmp_path / "run", quiet, engine="flower", samples=0)
