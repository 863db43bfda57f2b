"""The folder of a run on the server: whose it is, and where a run in it goes on."""

from __future__ import annotations

from pathlib import Path

from aggregators import Layout
from fedserver.configuration import RunConfiguration
from fedserver.global_model import GlobalModel
from fedserver.ledger import Ledger, LedgerError


def open_existing(folder: Path, configuration: RunConfiguration, *, resume: bool) -> Ledger | None:
    """The ledger to continue, None for a fresh folder; refuses a folder that is another run's."""
    if not (folder / "ledger.db").is_file():
        if resume and not folder.exists():
            raise LedgerError(f"there is nothing to resume in {folder}")
        if folder.is_dir() and any(folder.iterdir()) and not resume:
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


def restore(ledger: Ledger, layout: Layout) -> tuple[GlobalModel, int]:
    """The state after the last committed round, and that round's number (0: none yet)."""
    last = ledger.last("round")
    if last is None:
        return GlobalModel.empty(layout), 0
    return GlobalModel.from_bytes(ledger.get(last.content["state"]), layout), last.round
