"""The tables of a run's report: bytes against baselines, the nodes, and every number there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fedserver import quantities
from fedserver.events import ACCEPTED
from simulations import charts
from simulations.axes import Chart
from simulations.pages import datum
from simulations.run_directory import NodeRound, Run, integer, number, text


@dataclass(frozen=True)
class NodeSummary:
    """A node over the whole run, as a row of the node table."""

    name: str
    what: str
    key: Markup
    sends: str
    examples: int | None
    weight: float | None
    first: float | None
    last: float | None
    spark: Markup
    up: int
    down: int
    verdicts: tuple[tuple[str, int, bool], ...]


@dataclass(frozen=True)
class FamilyRow:
    """A family of updates over the whole run; ``gain`` in nats a token, None: not evaluated.

    ``weight``: of its mean in the sum, itself the mean over rounds.
    """

    name: str
    nodes: int | None
    weight: float | None
    up: float | None
    down: float | None
    seconds: float | None
    gain: float | None


@dataclass(frozen=True)
class Column:
    """A column of a table of numbers: its name, and its cell for a row."""

    name: str
    field: str
    shown: Callable[[Any], str]

    def cell(self, row: object) -> Markup:
        """The number as it reads, with its exact value in the markup."""
        value = getattr(row, self.field)
        return datum(value, self.shown(value))


@dataclass(frozen=True)
class FamilyColumn(Column):
    """How many updates of each family a round took in."""

    def cell(self, row: object) -> Markup:
        """Counts with the names of their families."""
        parts = [
            Markup("{}\u00a0{}").format(datum(count, str(count)), name.replace("_", "-"))
            for name, count in getattr(row, self.field)
        ]
        return Markup(", ").join(parts) if parts else datum(None, "")


@dataclass(frozen=True)
class TextColumn(Column):
    """Words, not numbers."""

    def cell(self, row: object) -> Markup:
        """The words as they are, escaped."""
        value = self.shown(getattr(row, self.field))
        return Markup("{}").format(value) if value else datum(None, "")


def family_table(run: Run) -> list[FamilyRow]:
    """What each family cost and what it is worth; [] where a run has one alone."""
    found = run.summary.get("families")
    if not isinstance(found, dict) or len(found) < 2:
        return []
    return [
        FamilyRow(
            text(name).replace("_", "-"),
            integer(work.get("nodes")),
            number(work.get("weight")),
            number(work.get("bytes_up")),
            number(work.get("bytes_down")),
            number(work.get("seconds")),
            number(work.get("contribution")),
        )
        for name, work in found.items()
        if isinstance(work, dict)
    ]


def all_replies(run: Run) -> list[tuple[int, NodeRound]]:
    """Every reply with the number of its round."""
    return [(entry.round, reply) for entry in run.rounds for reply in entry.nodes]


def verdict_words(verdict: str) -> str:
    """A verdict as it reads in a sentence: "not finite"."""
    return verdict.replace("_", " ")


def byte_table(run: Run) -> dict[str, Any]:
    """Bytes of the whole run, both ways, beside the two baselines where they were recorded."""
    up, down = (_total(run, direction) for direction in ("bytes_up", "bytes_down"))
    total = None if up is None and down is None else (up or 0) + (down or 0)
    full = run.number("bytes_full_model")
    entries = (
        ("This run", f"{quantities.bytes_text(up)} up, {quantities.bytes_text(down)} down", total),
        (
            "LoRA, fp32",
            "every node that a round asked receives and sends factors of its own rank",
            run.number("bytes_full_lora"),
        ),
        (
            "FedAvg, whole model, fp32",
            "every node that a round asked receives and sends all weights",
            full,
        ),
    )
    known = [(name, what, count) for name, what, count in entries if count is not None]
    largest = max((count for _, _, count in known), default=0) or 1
    against, note = "", "No baseline was recorded."
    if total and full:
        against = f"1/{_ratio(full / total)} of what FedAvg of the whole model moves"
        note = f"FedAvg of the whole model moves {quantities.bytes_text(full)} in as many rounds."
    return {
        "total": total,
        "against": against,
        "note": f"{quantities.bytes_text(total)} in all, both ways. {note}" if total else note,
        "rows": [
            {
                "name": name,
                "what": what,
                "bytes": count,
                "ratio": f"{_ratio(count / total)} ×" if total else quantities.MISSING,
                "bar": charts.proportion(count / largest, 0 if name == "This run" else 5),
            }
            for name, what, count in known
        ],
    }


def node_table(run: Run) -> list[NodeSummary]:
    """A row per node, in the order in which they first appear."""
    grouped: dict[str, list[NodeRound]] = {}
    losses = []
    for _, reply in all_replies(run):
        grouped.setdefault(reply.node, []).append(reply)
        found = (reply.train_loss_first, reply.train_loss)
        losses += [loss for loss in found if loss is not None and abs(loss) <= charts.LARGEST]
    domain = (min(losses, default=0.0), max(losses, default=1.0))
    few = len(grouped) <= charts.TONES
    return [
        _summarise(name, rows, _described(run, name, rows), domain, index, few)
        for index, (name, rows) in enumerate(grouped.items())
    ]


def round_columns(run: Run) -> list[Column]:
    """The columns of the table of rounds; ε only where a run has a privacy budget."""
    private = any(entry.epsilon is not None for entry in run.rounds)
    return [column for column in ROUND_COLUMNS if private or column.field != "epsilon"]


def _total(run: Run, field: str) -> float | None:
    recorded = [count for r in run.rounds if (count := getattr(r, field)) is not None]
    summed = run.number(field)
    return sum(recorded) if summed is None and recorded else summed


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _summarise(
    name: str,
    rows: Sequence[NodeRound],
    what: str,
    domain: tuple[float, float],
    index: int,
    marked: bool,
) -> NodeSummary:
    trained = [row for row in rows if row.train_loss is not None]
    spans = "; ".join(
        f"{quantities.loss_text(row.train_loss_first)} to {quantities.loss_text(row.train_loss)}"
        for row in trained
    )
    counted = Counter(row.verdict for row in rows)
    return NodeSummary(
        name=name,
        what=what,
        key=charts.key(index) if marked else Markup(""),
        sends=next((row.sends for row in reversed(rows) if row.sends), ""),
        examples=max((row.examples for row in rows if row.examples is not None), default=None),
        weight=next((row.weight for row in reversed(rows) if row.weight), None),
        first=next((row.train_loss_first for row in trained), None),
        last=trained[-1].train_loss if trained else None,
        spark=charts.sparkline(
            Chart(f"node-{index}", "Training loss by round", spans, 104, 38),
            [(row.train_loss_first, row.train_loss) for row in rows],
            domain,
            index if marked else 5,
        ),
        up=sum(row.bytes_up or 0 for row in rows),
        down=sum(row.bytes_down or 0 for row in rows),
        verdicts=tuple(
            (verdict_words(verdict), count, verdict == ACCEPTED)
            for verdict, count in sorted(counted.items(), key=lambda item: item[0] != ACCEPTED)
        ),
    )


def _described(run: Run, name: str, rows: Sequence[NodeRound]) -> str:
    """What a node is and holds: from the metrics where they say it, else from the scenario."""
    entry = next((entry for entry in _entries(run) if text(entry.get("name")) == name), {})
    listed = entry.get("categories")
    categories = next((row.categories for row in rows if row.categories), "")
    if not categories and isinstance(listed, list):
        categories = ", ".join(text(item) for item in listed)
    return ": ".join(part for part in (text(entry.get("description")), categories) if part)


def _entries(run: Run) -> list[Mapping[str, Any]]:
    entries = run.settings.get("nodes")
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


ROUND_COLUMNS = (
    Column("Evaluation loss", "eval_loss", quantities.loss_text),
    Column("Accuracy", "eval_accuracy", quantities.share_text),
    Column("Training loss", "loss", quantities.loss_text),
    Column("Accepted", "accepted", quantities.count_text),
    Column("Not accepted", "rejected", quantities.count_text),
    FamilyColumn("Families", "families", str),
    Column("Up", "bytes_up", quantities.bytes_text),
    Column("Down", "bytes_down", quantities.bytes_text),
    Column("Carry rank", "carry_rank", quantities.count_text),
    Column("Tail energy", "tail_energy", quantities.share_text),
    Column("ε", "epsilon", quantities.number_text),
    Column("Time", "seconds", quantities.duration_text),
)
NODE_COLUMNS = (
    TextColumn("Sends", "sends", str),
    Column("Examples", "examples", quantities.count_text),
    Column("Weight", "weight", quantities.share_text),
    Column("Loss, first", "train_loss_first", quantities.loss_text),
    Column("Loss, last", "train_loss", quantities.loss_text),
    Column("Memory, by the model", "memory_bytes", quantities.bytes_text),
    Column("Process grew by", "memory_grown", quantities.bytes_text),
    TextColumn("Chosen as", "choice", str),
    Column("Norm", "norm", quantities.number_text),
    Column("Up", "bytes_up", quantities.bytes_text),
    Column("Down", "bytes_down", quantities.bytes_text),
    Column("Time", "seconds", quantities.duration_text),
)
