"""Charts as inline SVG: lines, bars and sparklines that need no script and no request.

Colours are CSS classes (``tone-0`` ...), so that one drawing serves light, dark and print. A series
is told by its marker shape, its dash pattern and a label beside it, never by colour alone. Every
drawing has a title and a description; hovering over a point shows its exact value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from simulations.axes import (
    Chart,
    Frame,
    horizontal_grid,
    shorten,
    spread,
    svg,
    text,
    text_width,
    ticks,
)

TONES = 8
"""How many distinguishable series colours the style sheet defines."""
MARK_LINE, MARK_LINES = 15, 4
"""Height of a mark's words, and in how many lines those of several stand."""
LARGEST = 1e15
"""A larger value is a fault, not a measurement: it is in the tables, not in the charts."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line: ``main`` is drawn strong with its values, ``faint`` thin and without a label."""

    name: str
    points: tuple[Point, ...]
    tone: int | None = None
    main: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at ``x``, with the words at its head."""

    x: float
    words: str


@dataclass(frozen=True)
class Band:
    """An interval around a line: (x, low, high)."""

    points: tuple[tuple[float, float, float], ...]
    tone: int


def line_chart(
    chart: Chart,
    series: Sequence[Series],
    bands: Sequence[Band] = (),
    *,
    x_label: str = "round",
    y_label: str = "loss",
    y_from: float | None = None,
    label_width: float = 0,
    marks: Sequence[Mark] = (),
) -> Markup:
    """Lines over integer x, at most one of them main.

    With ``label_width`` names stand at the right end of lines, kept apart, and the main line's
    values under the axis, where no other line crosses them; without it they stand at its points.
    """
    series = [_drawable(line) for line in series]
    series = [line for line in series if line.points]
    if not series:
        return Markup("")
    x_values = [x for line in series for x, _ in line.points]
    y_values = [y for line in series for _, y in line.points]
    y_values += [y for band in bands for _, low, high in band.points for y in (low, high)]
    y_ticks = ticks(
        min(y_values) if y_from is None else min(y_from, *y_values),
        max(y_values),
        6 if chart.height > 300 else 5,
    )
    alone = 0.5 if min(x_values) == max(x_values) else 0.0
    below = next((line for line in series if line.main), None) if label_width else None
    heading = text_width(x_label) + 4 if below else 0.0
    named = [text_width(line.name) for line in series if not line.faint]
    frame = Frame(
        width=chart.width,
        height=chart.height,
        left=max(heading, *(text_width(chart.y_text(tick)) for tick in y_ticks)) + 10,
        right=max(min(label_width, max(named, default=0.0) + 30), 8),
        # The words of marks stand above the plot.
        top=16 + MARK_LINE * min(len(marks), MARK_LINES),
        bottom=46,
        inset=24,
        # A single round stands in the middle.
        x_range=(min(x_values) - alone, max(x_values) + alone),
        y_range=(y_ticks[0], y_ticks[-1]),
    )
    parts = [
        horizontal_grid(chart, frame, y_ticks),
        _rounds(chart, frame, x_label, y_label, below),
    ]
    parts += [_band(frame, band) for band in bands]
    parts += [_mark(frame, index, mark) for index, mark in enumerate(marks)]
    order = sorted(series, key=lambda line: (line.main, not line.faint))
    parts += [_line(chart, frame, line, values=not label_width) for line in order]
    if label_width:
        parts.append(_end_labels(frame, [line for line in series if not line.faint], frame.right))
    return svg(chart, parts)


def bar_chart(
    chart: Chart, groups: Sequence[tuple[str, Sequence[float | None]]], names: Sequence[str]
) -> Markup:
    """Bars side by side, a group for each (label, values); ``names`` are the bars of a group."""
    values = [v for _, group in groups for v in group if v is not None and 0 <= v <= LARGEST]
    if not values:
        return Markup("")
    y_ticks = ticks(0.0, max(values), 4)
    frame = Frame(
        width=chart.width,
        height=chart.height,
        left=max(text_width(chart.y_text(tick)) for tick in y_ticks) + 14,
        right=8,
        top=34,
        bottom=40,
        x_range=(0.0, float(len(groups))),
        y_range=(0.0, y_ticks[-1]),
    )
    parts = [horizontal_grid(chart, frame, y_ticks)]
    slot = (frame.width - frame.left - frame.right) / len(groups)
    bar = min(34.0, slot * 0.8 / len(names))
    every = math.ceil(len(groups) / max(1, (frame.width - frame.left) // 34))
    for index, (label, group) in enumerate(groups):
        middle = frame.x(index + 0.5)
        for position, (name, value) in enumerate(zip(names, group, strict=True)):
            if value is None or not 0 <= value <= LARGEST:
                continue
            left = middle + (position - len(names) / 2) * bar
            top = frame.y(value)
            parts.append(
                Markup(
                    '<rect class="bar tone-{} bar-{}" x="{:.1f}" y="{}" width="{:.1f}"'
                    ' height="{:.1f}" rx="1.5"><title>{}</title></rect>'
                ).format(
                    position % TONES,
                    position,
                    left + bar * 0.04,
                    top,
                    bar * 0.92,
                    max(frame.y(0) - top, 0.5),
                    f"{label}, {name}: {(chart.value_text or chart.y_text)(value)}",
                )
            )
        if index % every == 0:
            parts.append(text(middle, frame.height - 22, label, "tick", "middle"))
    parts.append(text(frame.x(len(groups) / 2), frame.height - 4, "round", "axis", "middle"))
    offset = frame.left
    for position, name in enumerate(names):
        parts.append(
            Markup(
                '<rect class="bar tone-{} bar-{}" x="{}" y="8" width="11" height="11" rx="2"/>'
            ).format(position % TONES, position, round(offset, 1))
        )
        parts.append(text(offset + 17, 18, name, "label", "start"))
        offset += 17 + text_width(name) + 20
    return svg(chart, parts)


def sparkline(
    chart: Chart,
    spans: Sequence[tuple[float | None, float | None]],
    domain: tuple[float, float],
    tone: int = 0,
) -> Markup:
    """One stroke per round from its first to its last loss; ``domain`` is shared by all nodes."""
    low, high = domain
    if not spans or not (abs(low) <= LARGEST and abs(high) <= LARGEST):
        return Markup("")
    frame = Frame(
        chart.width,
        chart.height,
        4,
        4,
        4,
        4,
        (0.0, float(len(spans))),
        (low, high if high > low else low + max(abs(low), 1.0)),
    )
    parts: list[Markup] = []
    for index, (first, last) in enumerate(spans):
        known = [v for v in (first, last) if v is not None and low <= v <= high]
        if len(known) == 2:
            parts.append(
                Markup('<path class="spark tone-{}" d="M{},{}L{},{}"/>').format(
                    tone % TONES,
                    frame.x(index),
                    frame.y(known[0]),
                    frame.x(index + 0.86),
                    frame.y(known[1]),
                )
            )
        if last is not None and low <= last <= high:
            parts.append(
                Markup('<circle class="spark-end tone-{}" cx="{}" cy="{}" r="2.4"/>').format(
                    tone % TONES, frame.x(index + 0.86), frame.y(last)
                )
            )
    return svg(chart, parts) if parts else Markup("")


def proportion(share: float, tone: int) -> Markup:
    """A horizontal bar of ``share`` (0 to 1) of its cell; decoration beside a number."""
    width = round(100 * min(max(share, 0.0), 1.0), 3)
    return Markup(
        '<svg class="proportion" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="6"/>'
        '<rect class="bar tone-{}" width="{}" height="6"/></svg>'
    ).format(tone % TONES, max(width, 0.25))


def key(tone: int) -> Markup:
    """The marker of a series, to stand beside its name in a table."""
    return Markup(
        '<svg class="key" viewBox="-6 -6 12 12" aria-hidden="true">'
        '<path class="marker tone-{}" d="{}"/></svg>'
    ).format(tone % TONES, MARKERS[tone % TONES])


def _drawable(line: Series) -> Series:
    points = tuple(p for p in line.points if abs(p[0]) <= LARGEST and abs(p[1]) <= LARGEST)
    return Series(line.name, points, line.tone, line.main, line.faint)


def _rounds(chart: Chart, frame: Frame, x_label: str, y_label: str, main: Series | None) -> Markup:
    """Tick labels under the axis and, on the next line, the main line's values there."""
    shown = chart.value_text or chart.y_text
    values = dict(main.points) if main else {}
    first_line = frame.height - frame.bottom + 20
    parts = []
    for value in _x_ticks(chart, frame, [shown(value) for value in values.values()]):
        parts.append(text(frame.x(value), first_line, chart.x_text(value), "tick", "middle"))
        if value in values:
            told = shown(values[value])
            parts.append(text(frame.x(value), first_line + 18, told, "value", "middle"))
    if main:
        parts.append(text(0, first_line, x_label, "axis", "start"))
        parts.append(text(0, first_line + 18, y_label, "axis", "start"))
    else:
        middle = (frame.left + frame.width - frame.right) / 2
        parts.append(text(middle, frame.height - 6, x_label, "axis", "middle"))
    return Markup("").join(parts)


def _x_ticks(chart: Chart, frame: Frame, values: Sequence[str]) -> list[float]:
    """Round numbers along the axis, as many as have room for their labels, and ``values`` below them.

    Of an axis that counts whole ones.
    """
    low, high = frame.x_range
    wanted = max([text_width(value) for value in values] + [28.0])
    found: list[float] = [low]
    least = math.floor(math.log10((high - low) / frame.width))
    for step in (m * 10.0**k for k in range(least, 18) for m in (1, 2, 5)):
        if chart.counts and step < 1:
            continue
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last < first:
            # No step has room for two labels: one of those before it has.
            return found[:1]
        found = [float(f"{index * step:.12g}") for index in range(first, last + 1)]
        labels = [chart.x_text(value) for value in found]
        widest = max([wanted, *map(text_width, labels)])
        apart = all(frame.x(b) - frame.x(a) >= widest + 12 for a, b in pairwise(found))
        # Labels of few digits may be those of several values.
        if apart and len(set(labels)) == len(labels):
            break
    return found


def _band(frame: Frame, band: Band) -> Markup:
    upper = [f"{frame.x(x)},{frame.y(high)}" for x, _, high in band.points]
    lower = [f"{frame.x(x)},{frame.y(low)}" for x, low, _ in reversed(band.points)]
    return Markup('<path class="band tone-{}" d="M{}Z"/>').format(
        band.tone % TONES, "L".join(upper + lower)
    )


def _mark(frame: Frame, index: int, mark: Mark) -> Markup:
    low, high = frame.x_range
    # One behind the last round still stands in the plot.
    x = frame.x(min(max(mark.x, low), high + 0.5 if high - low > 1 else high))
    head = 12 + MARK_LINE * (index % MARK_LINES)
    on_left = x > frame.width / 2
    line = Markup('<path class="mark" d="M{},{}V{}"/>').format(
        x, head - 9, frame.height - frame.bottom
    )
    words = text(
        x - 5 if on_left else x + 5, head, mark.words, "mark-words", "end" if on_left else "start"
    )
    return line + words


def _line(chart: Chart, frame: Frame, line: Series, *, values: bool) -> Markup:
    tone = "plain" if line.tone is None else f"tone-{line.tone % TONES} dash-{line.tone % TONES}"
    weight = "main" if line.main else "faint" if line.faint else "normal"
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    path = "L".join(f"{x},{y}" for x, y in places)
    parts = [Markup('<path class="line {} {}" d="M{}"/>').format(tone, weight, path)]
    if line.faint:
        return parts[0]
    crowded = len(places) > 40
    shown = chart.value_text or chart.y_text
    for index, ((x, y), (x_value, value)) in enumerate(zip(places, line.points, strict=True)):
        last = index == len(places) - 1
        if crowded and not last:
            continue
        shape = MARKERS[(line.tone or 0) % TONES]
        parts.append(
            Markup(
                '<path class="marker {} {}" transform="translate({} {})" d="{}">'
                "<title>{}</title></path>"
            ).format(
                tone, weight, x, y, shape, f"{line.name}, {chart.x_text(x_value)}: {value:.6g}"
            )
        )
        if values and line.main and (len(places) <= 7 or last or index == 0):
            above = y - 12 if y - 12 > 10 else y + 22
            parts.append(text(x, above, shown(value), "value", "middle"))
    return Markup('<g class="series">{}</g>').format(Markup("").join(parts))


def _end_labels(frame: Frame, series: Sequence[Series], width: float) -> Markup:
    ends = [frame.y(line.points[-1][1]) for line in series]
    bottom = frame.height - frame.bottom
    gap = min(17.0, max(9.0, (bottom - frame.top) / max(len(series), 1)))
    parts = []
    for line, end, place in zip(series, ends, spread(ends, gap, frame.top, bottom), strict=True):
        tone = "plain" if line.tone is None else f"tone-{line.tone % TONES}"
        x = frame.x(line.points[-1][0])
        parts.append(
            Markup('<path class="leader {}" d="M{:.1f},{:.1f}L{:.1f},{:.1f}"/>').format(
                tone, x + 7, end, x + 17, place
            )
        )
        parts.append(
            Markup(
                '<text class="label {} {}" x="{:.1f}" y="{:.1f}">{}<title>{}</title></text>'
            ).format(
                tone,
                "strong" if line.main else "",
                x + 21,
                place + 4,
                shorten(line.name, width - 24),
                line.name,
            )
        )
    return Markup("").join(parts)


MARKERS = (
    "M0,-4A4,4 0 1 1 0,4A4,4 0 1 1 0,-4Z",
    "M-3.6,-3.6H3.6V3.6H-3.6Z",
    "M0,-4.8L4.6,3.4H-4.6Z",
    "M0,-5L5,0L0,5L-5,0Z",
    "M0,4.8L4.6,-3.4H-4.6Z",
    "M-1.5,-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    "M-4.4,-2.4L-2.4,-4.4L0,-2L2.4,-4.4L4.4,-2.4L2,0L4.4,2.4L2.4,4.4L0,2L-2.4,4.4L-4.4,2.4L-2,0Z",
    "M-4.6,0L-2.3,-4H2.3L4.6,0L2.3,4H-2.3Z",
)
"""Marker shapes: circle, square, triangle, diamond, triangle down, plus, cross, hexagon."""
