"""The frame of a chart: its rectangle, title and axis, round tick values, labels kept apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

Format = Callable[[float], str]


@dataclass(frozen=True)
class Chart:
    """What all drawings share. ``identity`` must be unique on the page: titles refer to it.

    ``y_text`` writes ticks, ``value_text`` (by default the same) the values of a main line. ``counts``:
    whether x is whole numbers, as rounds are.
    """

    identity: str
    title: str
    description: str
    width: float = 1040
    height: float = 380
    y_text: Format = field(default=lambda value: f"{value:.10g}")
    value_text: Format | None = None
    x_text: Format = field(default=lambda value: f"{value:.0f}")
    counts: bool = True


@dataclass(frozen=True)
class Frame:
    """The plot's rectangle inside the drawing, and the values at its edges."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float] = (0.0, 1.0)
    y_range: tuple[float, float] = (0.0, 1.0)
    inset: float = 0.0

    def x(self, value: float) -> float:
        """Horizontal position of a value."""
        low, high = self.x_range
        inner = self.width - self.left - self.right - 2 * self.inset
        return round(self.left + self.inset + inner * (value - low) / (high - low), 1)

    def y(self, value: float) -> float:
        """Vertical position of a value."""
        low, high = self.y_range
        inner = self.height - self.top - self.bottom
        return round(self.top + inner * (1 - (value - low) / (high - low)), 1)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers that enclose [low, high]; never fewer than two."""
    if not high - low > 1e-9 * max(abs(low), abs(high), 1e-9):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - (margin if low else 0.0), high + margin
    raw = (high - low) / max(count - 1, 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(s * magnitude for s in (1, 2, 2.5, 5, 10) if s * magnitude >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart to at least ``gap``, in order, inside [low, high] where they fit."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [min(max(positions[i], low), high) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if placed and placed[-1] > high:
        placed[-1] = high
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    result = [0.0] * len(positions)
    for i, position in zip(order, placed, strict=True):
        result[i] = round(position, 1)
    return result


def text_width(content: str, size: float = 12.5) -> float:
    """An estimate, wide enough for common fonts; East Asian characters count double."""
    return sum(size * (1.0 if ord(c) > 0x2E7F else 0.6) for c in content)


def shorten(content: str, width: float) -> str:
    """Cut with an ellipsis to an estimated width."""
    if text_width(content) <= width:
        return content
    while content and text_width(content + "…") > width:
        content = content[:-1]
    return content.rstrip() + "…"


def svg(chart: Chart, parts: Sequence[Markup]) -> Markup:
    """A drawing of its parts, with the title and the description that readers announce."""
    return Markup(
        '<svg role="img" viewBox="0 0 {width:g} {height:g}"'
        ' aria-labelledby="{id}-title {id}-desc"><title id="{id}-title">{title}</title>'
        '<desc id="{id}-desc">{description}</desc>{body}</svg>'
    ).format(
        width=chart.width,
        height=chart.height,
        id=chart.identity,
        title=chart.title,
        description=chart.description,
        body=Markup("").join(parts),
    )


def text(x: float, y: float, content: str, kind: str, anchor: str) -> Markup:
    """A text of a class of the style sheet."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, content
    )


def horizontal_grid(chart: Chart, frame: Frame, y_ticks: Sequence[float]) -> Markup:
    """Lines across the plot at the ticks, the lowest stronger, with their values."""
    parts = []
    for tick in y_ticks:
        parts.append(
            Markup('<path class="{}" d="M{:g},{}H{:g}"/>').format(
                "baseline" if tick == y_ticks[0] else "rule",
                frame.left,
                frame.y(tick),
                frame.width - frame.right,
            )
        )
        parts.append(text(frame.left - 8, frame.y(tick) + 4, chart.y_text(tick), "tick", "end"))
    return Markup("").join(parts)
