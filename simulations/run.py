"""One simulation from a scenario to a finished run folder: rounds, samples, adapter, report."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from fedclient import base_model
from fedserver import events, metrics
from fedserver.configuration import ConfigurationError, RunConfiguration
from fedserver.export import export_peft, final_change
from fedserver.ledger import Ledger, LedgerError
from simulations.engines import ENGINES
from simulations.report import write_report
from simulations.run_directory import ADAPTER
from simulations.samples import sample_answers


def choose_folder(configuration: RunConfiguration, output: Path | None, *, resume: bool) -> Path:
    """The run folder: as asked, or ``runs/NAME``, with a number where that is taken.

    ``resume`` without ``output`` continues the newest run of that name.
    """
    chosen = output or (Path(configuration.output_dir) if configuration.output_dir else None)
    if chosen is not None:
        return chosen.expanduser()
    first = Path("runs") / configuration.name
    taken = [first] if first.exists() else []
    number = 2
    while (later := first.with_name(f"{first.name}-{number}")).exists():
        taken.append(later)
        number += 1
    if resume:
        if not taken:
            raise LedgerError(f"there is no run {first} to resume")
        return taken[-1]
    return later if taken else first


def simulate(
    configuration: RunConfiguration,
    folder: Path,
    emit: events.Listener,
    *,
    engine: str = "local",
    resume: bool = False,
    samples: int = 2,
) -> dict[str, Any]:
    """Run the scenario to its end and write everything that a run folder holds."""
    started = time.monotonic()
    if engine not in ENGINES:
        raise ConfigurationError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
    # Fetching and checking the model first: nothing is created in the folder when it is missing.
    base_folder = base_model.resolve(configuration.base_model)
    folder_existed = folder.exists()
    try:
        ENGINES[engine](configuration, folder, emit, resume=resume)
    except ConfigurationError:
        if not folder_existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    adapter = _export(folder, base_folder, emit)
    if samples:
        _, view = final_change(folder)
        answers = sample_answers(configuration, base_folder, view, samples)
        metrics.write_json(answers, folder / "samples.json")
    report = write_report(folder)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    emit(
        metrics.finished(
            summary,
            seconds=time.monotonic() - started,
            report=str(report),
            adapter=str(adapter or ""),
        )
    )
    return summary


def _export(folder: Path, base_folder: Path, emit: events.Listener) -> Path | None:
    # That of an earlier stop is not of this model.
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    _, view = final_change(folder)
    if view.full_rank:
        text = f"the model is more than an adapter; fedbraid export merged {folder} writes it whole"
        emit(events.Notice("info", text))
        return None
    try:
        return export_peft(folder, folder / ADAPTER, base_folder)
    except LedgerError as error:
        emit(events.Notice("warning", str(error)))
        return None


def ledger_head(folder: Path) -> str:
    """The head hash of a run folder's ledger."""
    ledger = Ledger(folder)
    try:
        return ledger.head
    finally:
        ledger.close()
