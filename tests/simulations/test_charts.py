"""Charts are well-formed, finite and inside their frame for any numbers."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations import charts
from simulations.axes import Chart, shorten, spread, text_width, ticks
from simulations.charts import Band, Series
from simulations.comparison_page import COSTS, Cost

values = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, 1e300, -1e300, 1e-300])
lines = st.lists(
    st.builds(
        Series,
        st.text(max_size=12),
        st.lists(values, max_size=12).map(
            lambda ys: tuple((float(i), y) for i, y in enumerate(ys))
        ),
        st.none() | st.integers(0, 20),
        st.booleans(),
        st.booleans(),
    ),
    max_size=10,
)


@given(lines=lines, label_width=st.sampled_from([0, 120]), title=st.text(max_size=20))
def test_line_charts_are_well_formed_and_stay_inside(
    lines: list[Series], label_width: int, title: str
) -> None:
    chart = Chart("id", clean(title), clean(title), 600, 300)
    named = [Series(clean(s.name), s.points, s.tone, s.main, s.faint) for s in lines]
    drawing = charts.line_chart(chart, named, label_width=label_width)
    if not drawing:
        return
    root = ElementTree.fromstring(str(drawing))
    assert root.find("title") is not None
    assert root.find("desc") is not None
    for path in root.iter("path"):
        if "line" in (path.get("class") or "").split():
            for x, y in re.findall(r"(-?[\d.e+-]+),(-?[\d.e+-]+)", path.get("d") or ""):
                assert 0 <= float(x) <= 600
                assert 0 <= float(y) <= 300


@given(
    groups=st.lists(st.tuples(st.none() | values, st.none() | values), max_size=40),
)
def test_bars_have_no_negative_height(groups: list[tuple[float | None, float | None]]) -> None:
    drawing = charts.bar_chart(
        Chart("id", "t", "d", 400, 232), [(str(i), g) for i, g in enumerate(groups)], ("up", "down")
    )
    for bar in ElementTree.fromstring(str(drawing)).iter("rect") if drawing else ():
        assert float(bar.get("height") or 0) > 0
        assert float(bar.get("width") or 0) > 0


@given(spans=st.lists(st.tuples(st.none() | values, st.none() | values), max_size=9))
def test_sparklines_are_well_formed(spans: list[tuple[float | None, float | None]]) -> None:
    drawing = charts.sparkline(Chart("id", "t", "d", 104, 38), spans, (0.0, 5.0))
    assert not drawing or ElementTree.fromstring(str(drawing)).tag == "svg"


def test_bands_lie_around_their_line() -> None:
    line = Series("mean", ((0.0, 1.0), (1.0, 2.0)), 0)
    band = Band(((0.0, 0.5, 1.5), (1.0, 1.0, 3.0)), 0)
    drawing = str(charts.line_chart(Chart("id", "t", "d"), [line], [band]))
    paths = {
        p.get("class", ""): p.get("d", "") for p in ElementTree.fromstring(drawing).iter("path")
    }
    heights = {
        kind: [float(y) for _, y in re.findall(r"([\d.]+),([\d.]+)", d)]
        for kind, d in paths.items()
    }
    upper_left, upper_right, lower_right, lower_left = heights["band tone-0"]
    left, right = heights["line tone-0 dash-0 normal"]
    # Downwards is positive in SVG.
    assert upper_left < left < lower_left
    assert upper_right < right < lower_right


@given(low=values.filter(lambda v: abs(v) < 1e15), span=st.floats(0, 1e6), count=st.integers(2, 9))
def test_ticks_enclose_the_values_and_are_few_and_even(low: float, span: float, count: int) -> None:
    high = low + span
    found = ticks(low, high, count)
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 2 * count + 2
    steps = [b - a for a, b in pairwise(found)]
    assert min(steps) > 0
    assert max(steps) == pytest.approx(min(steps), rel=1e-3, abs=slack)


@given(positions=st.lists(st.floats(0, 100), max_size=12), gap=st.floats(1, 8))
def test_labels_are_kept_apart_in_order_and_in_place(positions: list[float], gap: float) -> None:
    placed = spread(positions, gap, 0, 100)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    for one, other in pairwise(order):
        assert placed[other] - placed[one] >= gap - 0.11
    if len(positions) * gap <= 100:
        assert all(-0.1 <= place <= 100.1 for place in placed)


@given(text=st.text(max_size=40), width=st.floats(20, 200))
def test_shortened_text_fits(text: str, width: float) -> None:
    short = shorten(text, width)
    assert text_width(short) <= width
    assert short == text or short.endswith("…")


def clean(text: str) -> str:
    """What the reader of run directories lets through: XML forbids control characters."""
    return re.sub("[^\x20-\ud7ff\ue000-\ufffd]", "", text)


@settings(max_examples=60)
@given(
    cost=st.sampled_from(COSTS),
    low=st.floats(0, 1e4),
    spans=st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=6),
    width=st.sampled_from([400, 1040]),
)
def test_labels_of_an_axis_stand_apart_and_say_unlike_things(
    cost: Cost, low: float, spans: list[float], width: int
) -> None:
    chart = Chart("c", "t", "d", width, 360, x_text=cost.shown, counts=False)
    line = Series("mixed", tuple((low + x, 1.0 + x / 1e9) for x in [0.0, *sorted(spans)]), 0)
    drawn = charts.line_chart(chart, [line], x_label="", label_width=92)
    found = re.findall(
        r'<text class="tick" x="([^"]*)" y="[^"]*" text-anchor="middle">([^<]*)', drawn
    )
    labels = [label for _, label in found]
    assert labels
    assert len(set(labels)) == len(labels)
    for (one, text), (two, more) in pairwise(found):
        assert float(two) - float(one) >= (text_width(text) + text_width(more)) / 2
