"""Rows that are kept as JSON read like the rows that they were."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fedserver.dashboard.packed_rows import PackedRows
from fedserver.dashboard.run_reader import RunReader
from fedserver.ledger import Ledger

values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
rows_of_json = st.lists(st.dictionaries(st.text(), values | st.lists(values)))


@given(rows_of_json, st.data())
def test_packed_rows_are_the_rows(rows, data):
    packed = PackedRows([json.dumps(row).encode() for row in rows])
    assert list(packed) == rows
    assert len(packed) == len(rows)
    cut = data.draw(st.slices(len(rows)))
    assert list(packed[cut]) == rows[cut]
    if rows:
        place = data.draw(st.integers(-len(rows), len(rows) - 1))
        assert packed[place] == rows[place]


def test_a_rounds_entry_comes_apart_and_a_later_one_of_its_number_counts(tmp_path: Path):
    first, second = [{"node": "ä", "plan": {"x": [1, 2.5]}}], [{"node": "b"}, {"node": "c"}]
    run = RunReader(tmp_path, "run")
    with closing(Ledger(tmp_path, create=True)) as ledger:
        ledger.append("round", 1, {"nodes": first, "state": "0"}, {})
        assert list(run.round_nodes(1)) == first
        ledger.append("round", 1, {"nodes": second, "state": "1"}, {})
        assert list(run.round_nodes(1)) == second
        assert run.round_entry(1)["content"] == {"state": "1"}
        assert not run.round_nodes(2)
        assert run.round_entry(2) is None
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as damaged, damaged:
        damaged.execute("UPDATE entries SET content = 'none of JSON', hash = hash || 'x'")
    assert not run.round_nodes(1)
    assert run.round_entry(1)["content"] == {}
