"""The folder of a run on the server: whose it is, and where a run in it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aggregators import Layout
from fedserver.configuration import ConfigurationError, RunConfiguration, load
from fedserver.control import CONTROL
from fedserver.ledger import BLOBS, KEYS, LOCK, Entry, Ledger, LedgerError
from fedserver.scenario.rules import RULES


def open_existing(
    folder: Path, configuration: RunConfiguration, *, resume: bool, key_file: Path | None = None
) -> Ledger | None:
    """The ledger to continue, None for a fresh folder; refuses a folder that is another run's.

    ``key_file``: the server's private key, by default one in the folder.
    """
    if not _holds_run(folder, resume=resume):
        return None
    ledger = Ledger(folder, write=True, key_file=key_file)
    try:
        _check_continued(ledger, configuration, resume=resume)
    except LedgerError:
        ledger.close()
        raise
    return ledger


def check_startable(folder: Path, configuration: RunConfiguration, *, resume: bool) -> None:
    """Find out early what ``open_existing`` would refuse; changes nothing. Raises LedgerError."""
    if not _holds_run(folder, resume=resume):
        return
    ledger = Ledger(folder)
    try:
        _check_continued(ledger, configuration, resume=resume)
    finally:
        ledger.close()


def _holds_run(folder: Path, *, resume: bool) -> bool:
    """Whether there is a ledger; refuses what is no place for one."""
    if (folder / "ledger.db").is_file():
        return True
    if resume and not folder.exists():
        raise LedgerError(f"there is nothing to resume in {folder}")
    if folder.exists() and not folder.is_dir():
        raise LedgerError(f"{folder} is a file; choose a folder as --output")
    if folder.is_dir() and not _is_fresh(folder):
        raise LedgerError(f"{folder} is not empty and holds no run; choose another --output")
    return False


def _check_continued(ledger: Ledger, configuration: RunConfiguration, *, resume: bool) -> None:
    genesis = ledger.last("genesis")
    if genesis is None:
        return
    check_rules(ledger)
    if genesis.content["run"] != configuration.run_id():
        differing = [
            key
            for key, value in configuration.identity().items()
            if genesis.content["configuration"].get(key) != value
        ]
        raise LedgerError(
            f"{ledger.folder} holds another run (different {', '.join(differing) or 'scenario'});"
            " choose another --output"
        )
    if not resume:
        raise LedgerError(
            f"{ledger.folder} already holds this run; continue it with --resume, or"
            " choose another --output"
        )


def recorded_configuration(ledger: Ledger) -> RunConfiguration:
    """The configuration that the run was begun with, as its genesis entry has it.

    ``scenario.toml`` can be edited; of it only what decides no number is taken: name, description, and
    how many rounds were planned.
    """
    content = _genesis(ledger).content
    recorded = {key: value for key, value in content["configuration"].items() if key != "rules"}
    last = ledger.last("round")
    done = max(1, last.round if last is not None else 1)
    presented: dict[str, Any] = {"name": ledger.folder.name, "rounds": done}
    try:
        found = load(str(ledger.folder / "scenario.toml"))
        presented = {"name": found.name, "description": found.description}
        presented["rounds"] = max(done, found.rounds)
    except ConfigurationError:
        pass
    try:
        return RunConfiguration.model_validate({**recorded, **presented})
    except ValueError as error:
        check_rules(ledger)
        raise LedgerError(
            f"{ledger.folder}: the run's configuration cannot be read by this version: {error}"
        ) from None


def check_rules(ledger: Ledger) -> None:
    """Refuse to make states by other rules than the run's own. Raises LedgerError."""
    rules = _genesis(ledger).content["configuration"].get("rules", 1)
    if rules != RULES:
        which = "an older" if rules < RULES else "a newer"
        raise LedgerError(
            f"{ledger.folder} was made by {which} version of fedbraid, which adds updates by other"
            f" rules ({rules}, here {RULES}): replay or continue it with that version, or start a new"
            " run in another folder"
        )


def read_layout(ledger: Ledger) -> Layout:
    """The layout that the run's genesis names."""
    return Layout.from_json(ledger.get(_genesis(ledger).content["layout_blob"]).decode())


def _genesis(ledger: Ledger) -> Entry:
    genesis = ledger.last("genesis")
    if genesis is None:
        raise LedgerError(f"{ledger.folder} has no genesis entry: the run never began")
    return genesis


def _is_fresh(folder: Path) -> bool:
    """Nothing stands in it but an operator's requests, or a ledger's beginnings that were stopped."""
    return all(
        path.name in (LOCK, KEYS)
        or path.name.startswith(CONTROL)
        or ".part" in path.suffix  # with what SQLite puts behind it
        or (path.name == BLOBS and path.is_dir() and not any(path.iterdir()))
        for path in folder.iterdir()
    )
