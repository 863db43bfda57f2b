"""Benchmarks' tables in a pipe are whole."""

from __future__ import annotations

import pytest
from rich.table import Table

from simulations.benchmarks.tables import table_console


def test_a_wide_table_is_not_cut_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [f"a column with number {number}" for number in range(4)]
    table = Table(*names)
    table.add_row(*(f"what stands under {name}" for name in names))
    table_console().print(table)
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in names)
    assert all(f"what stands under {name} " in printed for name in names)
