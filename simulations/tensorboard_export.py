"""A run's metrics as TensorBoard event files: one scalar a round, named by what it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from simulations.run_directory import Round, Run, read_run

MOST_NODES = 100
"""Beyond this many, curves of single nodes are left out: no page could show them."""


class TensorBoardMissing(Exception):
    """The optional package is not installed; the message says how to get it."""


def export_tensorboard(run_directory: Path, target: Path) -> Path:
    """Write the scalars of every committed round into ``target``; returns it.

    Raises:
        TensorBoardMissing: without the extra ``fedbraid[tensorboard]``.
        RunDirectoryError: the folder is no run's.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TensorBoardMissing(
            "TensorBoard is not installed: pip install 'fedbraid[tensorboard]'"
        ) from None
    run = read_run(run_directory)
    nodes = {reply.node for entry in run.rounds for reply in entry.nodes}
    target.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(str(target))
    try:
        if run.scenario:
            # Four spaces make it code in the page's Markdown.
            scenario = "".join(f"    {line}\n" for line in run.scenario.splitlines())
            writer.add_text("scenario", scenario)
        for entry, moment in zip(run.rounds, _moments(run), strict=True):
            for tag, value in scalars(entry, nodes=len(nodes) <= MOST_NODES):
                writer.add_scalar(tag, value, entry.round, moment)
    finally:
        writer.close()
    return target


def scalars(entry: Round, *, nodes: bool) -> Iterator[tuple[str, float]]:
    """Tag and value of everything that a round measured; ``nodes``: those of single nodes too."""
    values = {
        "loss/training": entry.loss,
        "loss/evaluation": entry.eval_loss,
        "accuracy/evaluation": entry.eval_accuracy,
        "bytes/up": entry.bytes_up,
        "bytes/down": entry.bytes_down,
        "replies/accepted": entry.accepted,
        "replies/not_accepted": entry.rejected,
        "round/seconds": entry.seconds,
        "carry/rank": entry.carry_rank,
        "carry/tail_energy": entry.tail_energy,
        "privacy/epsilon": entry.epsilon,
    }
    values |= {f"families/{name}": count for name, count in entry.families}
    for reply in entry.nodes if nodes else ():
        values[f"node loss/{reply.node}"] = reply.train_loss
        values[f"node norm/{reply.node}"] = reply.norm
    return ((tag, value) for tag, value in values.items() if value is not None)


def _moments(run: Run) -> list[float]:
    """When each round ended, in seconds since 1970: metrics hold durations, the file the end."""
    ended = (run.path / "metrics.jsonl").stat().st_mtime if run.rounds else 0.0
    found = []
    for entry in reversed(run.rounds):
        found.append(ended)
        ended -= entry.seconds or 0.0
    return found[::-1]
