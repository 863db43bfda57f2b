"""Rows that are made when they are looked at give the same tables as rows that are there."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedserver.dashboard.html import cell
from fedserver.dashboard.tables import Choice, Column, LazyRows, make_table, to_csv

COLUMNS = (Column("name", "Name"), Column("size", "Size", "count"))
ROWS = st.lists(
    st.fixed_dictionaries(
        {"name": st.text("abc", max_size=3), "size": st.none() | st.integers(0, 9)}
    ),
    max_size=30,
)
CHOICES = st.builds(
    Choice,
    page=st.integers(1, 9),
    words=st.sampled_from(["", "a", "b c"]),
    sort=st.sampled_from(["", "size", "-size", "name", "-name", "none"]),
    whole=st.booleans(),
)


@given(ROWS, CHOICES, st.integers(1, 7))
def test_lazy_rows_give_the_same_page_csv_and_json(
    rows: list[dict[str, Any]], choice: Choice, size: int
) -> None:
    made: list[int] = []

    def make(place: int) -> dict[str, Any]:
        made.append(place)
        return rows[place]

    there = make_table("t", "T", COLUMNS, rows, choice, size=size)
    lazy = make_table("t", "T", COLUMNS, LazyRows(range(len(rows)), make), choice, size=size)
    plain = not choice.whole and choice.sort in ("", "none") and not choice.words
    if plain:
        # Of ten thousand nodes a page makes its own rows, and no others.
        assert len(made) <= size
    assert lazy.json() == there.json()
    assert to_csv(lazy) == to_csv(there)


@given(
    st.text(" \t\n\r\u00a0\ufeff\u200b\u200e\u200f\u061c\u2060\u3000", max_size=4),
    st.sampled_from("=+-@"),
)
def test_no_cell_of_a_csv_is_a_formula_behind_what_is_not_seen(before: str, sign: str) -> None:
    row = {"name": f"{before}{sign}1+1", "size": -1}
    table = make_table("t", "T", COLUMNS, [row], Choice(whole=True))
    _, cells = csv.reader(io.StringIO(to_csv(table)))
    assert cells == ["'" + row["name"], "-1"]


@given(st.text("a\u202e\u200b\u200e\u200f\u061c\u2066\u2028\ufeff", max_size=9))
def test_nothing_shown_turns_or_hides_its_neighbours(name: str) -> None:
    for kind in ("text", "mono", "hash", "state"):
        shown = cell({"name": name}, Column("name", "Name", kind))
        assert not re.search("[\u202e\u200b\u200e\u200f\u061c\u2066\u2028\ufeff]", shown)
