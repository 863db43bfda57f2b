"""The folder of a run on the server: whose it is, and where a run in it goes on."""

from __future__ import annotations

from pathlib import Path

from aggregators import Layout
from fedserver.configuration import RunConfiguration
from fedserver.global_model import GlobalModel
from fedserver.ledger import BLOBS, Ledger, LedgerError


def open_existing(folder: Path, configuration: RunConfiguration, *, resume: bool) -> Ledger | None:
    """The ledger to continue, None for a fresh folder; refuses a folder that is another run's."""
    if not (folder / "ledger.db").is_file():
        if resume and not folder.exists():
            raise LedgerError(f"there is nothing to resume in {folder}")
        if folder.exists() and not folder.is_dir():
            raise LedgerError(f"{folder} is a file; choose a folder as --output")
        if folder.is_dir() and not _is_fresh(folder):
            raise LedgerError(f"{folder} is not empty and holds no run; choose another --output")
        return None
    ledger = Ledger(folder)
    genesis = ledger.last("genesis")
    if genesis is not None and genesis.content["run"] != configuration.run_id():
        differing = [
            key
            for key, value in configuration.identity().items()
            if genesis.content["configuration"].get(key) != value
        ]
        ledger.close()
        raise LedgerError(
            f"{folder} holds another run (different {', '.join(differing) or 'scenario'});"
            " choose another --output"
        )
    if genesis is not None and not resume:
        ledger.close()
        raise LedgerError(f"{folder} already holds this run; continue it with --resume")
    return ledger


def _is_fresh(folder: Path) -> bool:
    """Nothing stands in it, or what a ledger leaves that was stopped while it was being made."""
    return all(
        path.name == BLOBS and path.is_dir() and not any(path.iterdir())
        for path in folder.iterdir()
    )


def restore(ledger: Ledger, layout: Layout) -> tuple[GlobalModel, int]:
    """The state after the last committed round, and that round's number (0: none yet)."""
    last = ledger.last("round")
    if last is None:
        return GlobalModel.empty(layout), 0
    return GlobalModel.from_bytes(ledger.get(last.content["state"]), layout), last.round
