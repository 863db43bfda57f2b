"""Tables of a view: typed columns and rows, which become HTML, JSON or CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

Row = dict[str, Any]
PAGE = 50
FORMULA = re.compile(
    r"[\t\r\n]|[\s\x00-\x1f\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]*"
    r"[=+\-@\uff1d\uff0b\uff0d\uff20]"
)
"""How a text begins that a spreadsheet may compute, which passes over what is not seen."""


@dataclass(frozen=True)
class Column:
    """``kind`` says how a value reads: text, count, bytes, seconds, loss, share, number, time, hash,
    state, mono, bar. ``link`` is the key of a row's address for this cell."""

    key: str
    title: str
    kind: str = "text"
    link: str = ""
    help: str = ""

    @property
    def numeric(self) -> bool:
        """Whether values stand at the right edge."""
        return self.kind in ("count", "bytes", "seconds", "loss", "share", "number")


@dataclass(frozen=True)
class Table:
    """A named table; ``empty`` is what stands in its place without rows."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    empty: str = "Nothing here yet."
    sort: str = ""
    page: int = 1
    size: int = PAGE
    words: str = ""
    searchable: bool = False
    total: int = field(default=0)

    @property
    def pages(self) -> int:
        """Number of pages, at least one."""
        return max(1, -(-self.total // self.size))

    def json(self) -> dict[str, Any]:
        """The page's rows and where it stands among all."""
        return {
            "columns": [column.key for column in self.columns],
            "rows": [{c.key: row.get(c.key) for c in self.columns} for row in self.rows],
            "page": self.page,
            "pages": self.pages,
            "total": self.total,
        }


@dataclass(frozen=True)
class Choice:
    """What a reader asks of a table: which page, which words, which order; ``whole`` for CSV."""

    page: int = 1
    words: str = ""
    sort: str = ""
    whole: bool = False


class LazyRows(Sequence[Row]):
    """Rows of ``made`` from ``keys``, each when it is looked at: a page of ten thousand makes fifty.

    Searching, sorting and CSV look at all of them.
    """

    def __init__(self, keys: Sequence[Any], made: Callable[[Any], Row]) -> None:
        self._keys = keys
        self._made = made

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self._made(key) for key in self._keys[index]]
        return self._made(self._keys[index])


def make_table(
    name: str,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    choice: Choice,
    *,
    empty: str = "Nothing here yet.",
    searchable: bool = True,
    size: int = PAGE,
) -> Table:
    """Search, sort and cut; rows without the sorted value stand last in either direction."""
    words = choice.words.casefold().split()
    if words and searchable:
        rows = [row for row in rows if _holds(row, columns, words)]
    key, down = choice.sort.removeprefix("-"), choice.sort.startswith("-")
    if any(column.key == key for column in columns):
        known = [row for row in rows if row.get(key) is not None]
        known.sort(key=lambda row: _order(row[key]), reverse=down)
        rows = known + [row for row in rows if row.get(key) is None]
    total = len(rows)
    page = min(max(choice.page, 1), max(1, -(-total // size)))
    shown = rows if choice.whole else rows[(page - 1) * size : page * size]
    return Table(
        name,
        title,
        columns,
        shown,
        "No row holds these words." if words and searchable else empty,
        choice.sort,
        page,
        size,
        choice.words,
        searchable,
        total,
    )


def to_csv(table: Table) -> str:
    """RFC 4180 with a header; a text that a spreadsheet would compute is led by an apostrophe."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([column.key for column in table.columns])
    for row in table.rows:
        writer.writerow([_inert(row.get(column.key)) for column in table.columns])
    return file.getvalue()


def _inert(value: Any) -> Any:
    if isinstance(value, str) and FORMULA.match(value):
        return "'" + value
    return "" if value is None else value


def _holds(row: Row, columns: Sequence[Column], words: Sequence[str]) -> bool:
    text = " ".join(str(row[c.key]) for c in columns if row.get(c.key) is not None).casefold()
    return all(word in text for word in words)


def _order(value: Any) -> tuple[int, Any]:
    if isinstance(value, (int, float)):
        return 0, value
    return 1, str(value).casefold()
