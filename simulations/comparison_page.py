"""One page over several runs: curves laid over each other, and means over seeds with intervals.

Run directories are named ``PRESET-seedN``; the runs of one preset are its seeds. Presets that share
seeds are also compared seed by seed, which removes what the seeds have in common.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from markupsafe import Markup

from fedserver import quantities
from fedserver.intervals import Estimate, estimate
from simulations import charts
from simulations.axes import Chart
from simulations.charts import Band, Series
from simulations.pages import datum, render, write_page
from simulations.run_directory import Round, Run, RunDirectoryError, read_run

BASELINE = "fedit"
"""The preset that others are compared with, where it is among the runs; else the first."""


@dataclass(frozen=True)
class Member:
    """One run of a group."""

    label: str
    seed: int | None
    run: Run


@dataclass(frozen=True)
class Group:
    """The runs of one preset over its seeds, in a tone of its own."""

    name: str
    tone: int
    members: tuple[Member, ...]

    def estimate(self, value: Callable[[Run], float | None]) -> Estimate | None:
        """Mean and interval of a number over the runs that recorded it."""
        found = [value(member.run) for member in self.members]
        return estimate([number for number in found if number is not None])


def comparison(runs: list[Path], target: Path) -> Path:
    """Write one page that compares run directories and return ``target``.

    Raises:
        RunDirectoryError: no run was given, or one of the folders is no run's.
    """
    if not runs:
        raise RunDirectoryError("nothing to compare: give at least one run directory")
    return write_page(comparison_html([read_run(path) for path in runs]), target)


def comparison_html(runs: Sequence[Run]) -> str:
    """The page of several runs."""
    groups = group(runs)
    reference = next((g for g in groups if g.name == BASELINE), groups[0])
    curves = [line for g in groups for line in _curves(g)]
    bands = [band for g in groups for band in _bands(g)]
    told = "; ".join(f"{g.name}: {_interval_words(g.estimate(final_loss))}" for g in groups)
    wide, narrow = (
        Chart(
            f"curves-{width}",
            "Evaluation loss over rounds",
            f"Mean over seeds after the last round. {told}.",
            width,
            height,
            value_text=quantities.loss_text,
        )
        for width, height in ((1040, 420), (400, 380))
    )
    return render(
        "comparison.html.jinja",
        costs=[cost_figure(groups, cost) for cost in COSTS],
        groups=groups,
        run_count=quantities.plural(len(runs), "run"),
        preset_count=quantities.plural(len(groups), "preset"),
        best=_best(groups),
        chart=charts.line_chart(wide, curves, bands, label_width=140),
        chart_narrow=charts.line_chart(narrow, curves, bands, label_width=92),
        columns=COLUMNS,
        rows=[(g, charts.key(g.tone), [column.cell(g) for column in COLUMNS]) for g in groups],
        reference=reference,
        paired=[row for g in groups if g is not reference for row in _paired(g, reference)],
        members=[(g, member, charts.key(g.tone)) for g in groups for member in g.members],
        problems_found=[
            f"{run.path.name}: {text}"
            for run in runs
            for text in (*run.problems, *_without_quorum(run))
        ],
        final_loss=final_loss,
        total_bytes=total_bytes,
    )


@dataclass(frozen=True)
class Cost:
    """What a run pays for its loss: running total after a round, or one number for the whole run."""

    identity: str
    title: str
    caption: str
    shown: Callable[[float | None], str]
    by_round: Callable[[Round], float | None] | None = None
    of_run: Callable[[Run], float | None] | None = None


def cost_points(run: Run, cost: Cost) -> tuple[tuple[float, float], ...]:
    """(cost so far, evaluation loss) after every round from 0 on; for a whole run, one point."""
    if cost.of_run is not None:
        total, loss = cost.of_run(run), final_loss(run)
        return () if total is None or loss is None else ((total, loss),)
    assert cost.by_round is not None
    losses = dict(run.curve())
    points, total = [(0.0, losses[0])] if 0 in losses else [], 0.0
    for entry in run.rounds:
        paid = cost.by_round(entry)
        if paid is None or entry.round not in losses:
            break
        total += paid
        points.append((total, losses[entry.round]))
    return tuple(points)


def cost_figure(groups: Sequence[Group], cost: Cost) -> dict[str, object]:
    """The chart of loss against a cost; empty where no run recorded it."""
    lines = []
    for found in groups:
        curves = [cost_points(member.run, cost) for member in found.members]
        curves = [curve for curve in curves if curve]
        lines += [Series(found.name, curve, found.tone, faint=True) for curve in curves]
        # Seeds pay alike: the mean of both coordinates, as far as every run of them is.
        shared = min((len(curve) for curve in curves), default=0)
        mean = [
            (fmean(curve[place][0] for curve in curves), fmean(curve[place][1] for curve in curves))
            for place in range(shared)
        ]
        lines.append(Series(found.name, tuple(mean), found.tone))
    wide, narrow = (
        charts.line_chart(
            Chart(
                f"{cost.identity}-{width}", cost.title, cost.caption, width, height,
                value_text=quantities.loss_text, x_text=cost.shown, counts=False,
            ),
            lines,
            x_label="",
            label_width=label,
        )
        for width, height, label in ((1040, 380, 140), (400, 360, 92))
    )  # fmt: skip
    return {"title": cost.title, "caption": cost.caption, "wide": wide, "narrow": narrow}


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs by preset, in the order in which the presets first appear."""
    found: dict[str, list[Member]] = {}
    for run in runs:
        folder = run.path.resolve().name
        match = re.fullmatch(r"(.+)-seed(\d{1,18})", folder)
        name = match[1] if match else run.preset or run.name
        seed = int(match[2]) if match else run.seed
        found.setdefault(name, []).append(Member(folder, seed, run))
    return [
        Group(name, index % charts.TONES, tuple(sorted(members, key=_by_seed)))
        for index, (name, members) in enumerate(found.items())
    ]


def final_loss(run: Run) -> float | None:
    """Evaluation loss after the run's last round; None for a run that is not that far."""
    return run.after.loss if run.after else None


def total_bytes(run: Run) -> float | None:
    """Bytes up and down over the whole run."""
    up, down = run.number("bytes_up"), run.number("bytes_down")
    return None if up is None or down is None else up + down


@dataclass(frozen=True)
class Quantity:
    """A column of the table of means."""

    name: str
    value: Callable[[Run], float | None]
    shown: Callable[[float | None], str]

    def cell(self, found: Group) -> Markup:
        """Mean and interval of this quantity over a group."""
        return interval(found.estimate(self.value), self.shown)


def interval(found: Estimate | None, shown: Callable[[float | None], str]) -> Markup:
    """A mean, and under it its half-width or that one seed allows none."""
    if found is None:
        return datum(None, "")
    if found.half_width is None:
        return Markup('{}<span class="sub">one seed</span>').format(
            datum(found.mean, shown(found.mean))
        )
    return Markup('{}<span class="sub">± {}</span>').format(
        datum(found.mean, shown(found.mean)), datum(found.half_width, shown(found.half_width))
    )


def _without_quorum(run: Run) -> list[str]:
    """What to say of a run whose loss is that of fewer rounds than it has."""
    rounds, reached = run.number("rounds"), run.number("rounds_with_quorum")
    if rounds is None or reached is None or reached >= rounds:
        return []
    return [
        f"{reached:g} of {rounds:g} rounds reached their quorum; the others left the model as it was"
    ]


def _by_seed(member: Member) -> tuple[bool, int, str]:
    return (member.seed is None, member.seed or 0, member.label)


def _curves(found: Group) -> list[Series]:
    lines = [
        Series(member.label, _points(member.run), found.tone, faint=True)
        for member in found.members
    ]
    mean = [(float(x), point.mean) for x, point in _by_round(found)]
    return [*lines, Series(found.name, tuple(mean), found.tone)]


def _bands(found: Group) -> list[Band]:
    points = [
        (float(x), point.low, point.high)
        for x, point in _by_round(found)
        if point.half_width is not None and abs(point.mean) <= charts.LARGEST
    ]
    return [Band(tuple(points), found.tone)] if len(points) > 1 else []


def _points(run: Run) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), y) for x, y in run.curve() if abs(y) <= charts.LARGEST)


def _by_round(found: Group) -> list[tuple[int, Estimate]]:
    """Mean and interval at every round that all runs of the group have reached."""
    curves = [dict(member.run.curve()) for member in found.members]
    curves = [curve for curve in curves if curve]
    shared = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    points = ((x, estimate([curve[x] for curve in curves])) for x in sorted(shared))
    return [(x, point) for x, point in points if point is not None]


def _best(groups: Sequence[Group]) -> tuple[str, Estimate] | None:
    found = [(g.name, value) for g in groups if (value := g.estimate(final_loss)) is not None]
    return min(found, key=lambda entry: entry[1].mean) if found else None


def _paired(found: Group, reference: Group) -> list[dict[str, object]]:
    """Difference of final losses, seed by seed; nothing where no seed is shared."""
    theirs = {m.seed: final_loss(m.run) for m in reference.members if m.seed is not None}
    differences = [
        ours - other
        for member in found.members
        if member.seed is not None
        and (other := theirs.get(member.seed)) is not None
        and (ours := final_loss(member.run)) is not None
    ]
    result = estimate(differences)
    if result is None:
        return []
    if result.half_width is None:
        verdict, kind = "one shared seed: no interval", ""
    elif result.high < 0:
        verdict, kind = "lower", "better"
    elif result.low > 0:
        verdict, kind = "higher", "worse"
    else:
        verdict, kind = "not told apart: the interval holds zero", ""
    return [
        {
            "name": found.name,
            "key": charts.key(found.tone),
            "seeds": result.count,
            "difference": interval(result, quantities.loss_text),
            "verdict": verdict,
            "kind": kind,
        }
    ]


def _interval_words(found: Estimate | None) -> str:
    if found is None:
        return "not evaluated"
    half = "" if found.half_width is None else f" ± {found.half_width:.3f}"
    return f"{found.mean:.3f}{half}"


def _round_bytes(entry: Round) -> float | None:
    if entry.bytes_up is None or entry.bytes_down is None:
        return None
    return entry.bytes_up + entry.bytes_down


COSTS = (
    Cost(
        "bytes", "Loss against bytes", "All nodes, both ways, up to the end of each round.",
        quantities.bytes_text, by_round=_round_bytes,
    ),
    Cost(
        "device-seconds", "Loss against the devices' time",
        "Every round takes as long as its slowest device: its work at its speed, then its link.",
        quantities.duration_text, by_round=lambda entry: entry.device_seconds,
    ),
    Cost(
        "memory", "Loss against device memory",
        "What the node that needs most of it needs, by the method's weights, gradients and state.",
        quantities.bytes_text, of_run=lambda run: run.number("device_memory"),
    ),
)  # fmt: skip
COLUMNS = (
    Quantity("Loss before", lambda r: r.before.loss if r.before else None, quantities.loss_text),
    Quantity("Loss after", final_loss, quantities.loss_text),
    Quantity(
        "Perplexity after",
        lambda r: r.after.perplexity if r.after else None,
        lambda v: quantities.number_text(v, 3),
    ),
    Quantity(
        "Accuracy after", lambda r: r.after.accuracy if r.after else None, quantities.share_text
    ),
    Quantity("Bytes", total_bytes, quantities.bytes_text),
    Quantity("Device memory", lambda r: r.number("device_memory"), quantities.bytes_text),
    Quantity("Time", lambda r: r.number("seconds"), quantities.duration_text),
)
