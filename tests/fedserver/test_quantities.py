"""Numbers read as people write them, and never lose their order of magnitude."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedserver import quantities

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}


@given(st.integers(0, 10**18))
def test_bytes_keep_three_digits(count: int) -> None:
    number, unit = quantities.bytes_text(count).split(" ")
    assert float(number.replace(",", "")) * UNITS[unit] == pytest.approx(count, rel=0.006)
    tick, tick_unit = quantities.bytes_tick(count).split(" ")
    assert float(tick.replace(",", "")) * UNITS[tick_unit] == pytest.approx(count, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (12.4, "12 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"),
     (3599.6, "1 h 00 min"), (7500, "2 h 05 min"), (None, "–"), (-1, "–")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert quantities.duration_text(seconds) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(2.0, 1.0, "−50.0\u202f%"), (1.0, 1.5, "+50.0\u202f%"), (None, 1.0, ""), (0.0, 1.0, "")],
)
def test_changes_have_a_sign_and_a_meaning(before: float | None, after: float, text: str) -> None:
    assert quantities.change_text(before, after) == text


def test_what_is_missing_is_a_dash() -> None:
    for shown in (
        quantities.bytes_text, quantities.count_text, quantities.duration_text,
        quantities.loss_text, quantities.number_text, quantities.share_text,
    ):  # fmt: skip
        assert shown(None) == quantities.MISSING


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_has_a_text(value: float) -> None:
    for shown in (quantities.loss_text, quantities.number_text, quantities.count_text):
        assert shown(value)
    assert "-" not in quantities.loss_text(value) or "e-" in quantities.loss_text(value)


def test_plurals() -> None:
    assert [quantities.plural(n, "reply") for n in (0, 1, 2)] == [
        "0 replies",
        "1 reply",
        "2 replies",
    ]
    assert quantities.plural(1200, "node") == "1,200 nodes"
