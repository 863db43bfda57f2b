"""The charts of a run's report: what is drawn, and the words beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from fedserver import quantities
from simulations import charts
from simulations.axes import Chart
from simulations.charts import Series
from simulations.run_directory import Run

FAINT_LINES = 60
"""Of a large cohort the loss chart draws this many nodes, evenly chosen."""
SMALL = (400, 232)


def figures(run: Run, nodes: Sequence[str]) -> dict[str, Markup | str]:
    """All drawings by name; one without data is empty. ``nodes``: their names, in table order."""
    lines, caption = _loss_lines(run, nodes)
    told = "; ".join(f"round {x}: {y:.3f}" for x, y in run.curve()) or "not evaluated"
    marks = [charts.Mark(one.round - 0.5, one.back_words) for one in run.rollbacks]
    title, description = "Loss over rounds", f"Evaluation loss by round: {told}."
    if marks:
        backs = "; ".join(f"before round {one.round} {one.back_words}" for one in run.rollbacks)
        description += f" Rolled back: {backs}."
        caption += " At a dashed upright line an operator rolled the model back."
    wide, narrow = (
        Chart(identity, title, description, width, height, value_text=quantities.loss_text)
        for identity, width, height in (("loss", 1040, 400), ("loss-narrow", 400, 360))
    )
    return {
        "loss": charts.line_chart(wide, lines, label_width=150, marks=marks),
        "loss_narrow": charts.line_chart(narrow, lines, label_width=104, marks=marks),
        "loss_caption": caption,
        "accuracy": _curve("accuracy", "Answer tokens predicted right", _accuracy(run), _percent),
        "rank": _curve(
            "rank",
            "Rank of the carry",
            [(r.round, float(r.carry_rank)) for r in run.rounds if r.carry_rank is not None],
            lambda rank: f"{rank:,.10g}",
        ),
        "tail": _curve(
            "tail",
            "Tail energy",
            [(r.round, r.tail_energy) for r in run.rounds if r.tail_energy is not None],
            _percent,
        ),
        "bytes": _bytes(run),
        "epsilon": _curve(
            "epsilon",
            "Privacy budget spent",
            [(r.round, r.epsilon) for r in run.rounds if r.epsilon is not None],
            lambda epsilon: f"{epsilon:.3g}",
        ),
    }


def _loss_lines(run: Run, nodes: Sequence[str]) -> tuple[list[Series], str]:
    few = len(nodes) <= charts.TONES
    every = -(-len(nodes) // FAINT_LINES) if not few else 1
    chosen = nodes[::every]
    lines = [
        Series(name, tuple(points), tone=nodes.index(name) if few else 5, faint=not few)
        for name, points in _training(run, chosen).items()
    ]
    mean = tuple((float(r.round), r.loss) for r in run.rounds if r.loss is not None)
    if mean and len(nodes) > 1:
        lines.append(Series("training, mean", mean, tone=None if few else 1))
    curve = tuple((float(x), y) for x, y in run.curve())
    if curve:
        lines.append(Series("evaluation", curve, main=True))
        caption = (
            "The strong line is the global model on the held-out examples of the nodes that evaluated"
            f" it{'; round 0 is the base model' if curve[0][0] == 0 else ''}."
        )
    else:
        caption = "This run was not evaluated."
    if few:
        caption += " The mean is weighted as the updates are. The other lines are each node's"
        caption += " training loss at the end of a round, on its"
    else:
        of = "all" if len(chosen) == len(nodes) else f"{len(chosen)} of"
        caption += f" The thin lines are {of} {len(nodes)} nodes' training loss, each on its"
    caption += " own data."
    return lines, caption


def _training(run: Run, names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for entry in run.rounds:
        for reply in entry.nodes:
            if reply.train_loss is not None and reply.node in found:
                found[reply.node].append((float(entry.round), reply.train_loss))
    return found


def _accuracy(run: Run) -> list[tuple[int, float]]:
    points = {r.round: r.eval_accuracy for r in run.rounds if r.eval_accuracy is not None}
    if run.before and run.before.accuracy is not None:
        points[0] = run.before.accuracy
    last = run.rounds[-1].round if run.rounds else 0
    if last and last not in points and run.after and run.after.accuracy is not None:
        points[last] = run.after.accuracy
    return sorted(points.items())


def _bytes(run: Run) -> Markup:
    told = "; ".join(
        f"round {r.round}: {quantities.bytes_text(r.bytes_up)} up,"
        f" {quantities.bytes_text(r.bytes_down)} down"
        for r in run.rounds
    )
    shown, exact = quantities.bytes_tick, quantities.bytes_text
    chart = Chart("bytes", "Bytes per round", told, *SMALL, shown, exact)
    groups = [(str(r.round), (r.bytes_up, r.bytes_down)) for r in run.rounds]
    return charts.bar_chart(chart, groups, ("up", "down"))


def _curve(
    identity: str,
    title: str,
    points: Sequence[tuple[int, float]],
    shown: Callable[[float], str],
) -> Markup:
    told = "; ".join(f"round {x}: {shown(y)}" for x, y in points) or "not recorded"
    line = Series(title, tuple((float(x), y) for x, y in points), tone=0, main=True)
    return charts.line_chart(Chart(identity, title, told, *SMALL, shown), [line], y_from=0.0)


def _percent(value: float) -> str:
    return f"{100 * value:.3g}\u202f%"
