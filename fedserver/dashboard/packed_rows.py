"""Rows kept as the JSON they came as: a tenth of the memory, each parsed when it is looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import overload

from fedserver.dashboard.run_files import Row


class PackedRows(Sequence[Row]):
    """Rows from the UTF-8 text of one JSON object each.

    Ten thousand replies of a round take 10 MB so, and 50 MB as dictionaries; parsing all of them takes
    as long as SQLite takes to find them.
    """

    def __init__(self, texts: Sequence[bytes] = ()) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[Row]:
        return map(json.loads, self._texts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return PackedRows(self._texts[index])
        row: Row = json.loads(self._texts[index])
        return row
