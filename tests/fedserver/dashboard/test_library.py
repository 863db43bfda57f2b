"""A library that has looked before sees what one that looks for the first time sees."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fedserver.dashboard import library
from fedserver.dashboard.library import Library

NAMES = ("a", "b", "group/a", "group/c", "deep/er/d", ".hidden")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "change", "end", "remove", "folder", "settle"]),
        st.sampled_from(NAMES),
    ),
    max_size=12,
)


def change(root: Path, action: str, name: str, number: int) -> None:
    folder = root / name
    match action:
        case "begin" | "change":
            folder.mkdir(parents=True, exist_ok=True)
            draft = folder / "draft"
            draft.write_text(json.dumps({"name": name, "state": "stopped", "committed": number}))
            draft.replace(folder / "live.json")
        case "end" if folder.is_dir():
            (folder / "summary.json").write_text(json.dumps({"seconds": number}))
        case "remove":
            shutil.rmtree(folder, ignore_errors=True)
        case "folder":
            folder.mkdir(parents=True, exist_ok=True)
        case "settle":
            # As if all this had happened long ago, when a folder's date can be relied on.
            for path in (root, *(p for p in root.rglob("*") if p.is_dir())):
                os.utime(path, ns=(10**18 + number, 10**18 + number))
        case _:
            pass


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_what_changes_below_the_folder_is_seen(steps: list[tuple[str, str]]) -> None:
    held = (library.SCAN_SECONDS, library.LOOK_SECONDS)
    library.SCAN_SECONDS = library.LOOK_SECONDS = 0.0
    try:
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            known = Library(root)
            for number, (action, name) in enumerate(steps):
                change(root, action, name, number)
                fresh = Library(root)
                assert known.rows() == fresh.rows()
                for run in fresh.folders():
                    reader = known.reader(run)
                    assert reader is not None
                    assert reader.live().get("committed") == known_round(root, reader.folder)
    finally:
        library.SCAN_SECONDS, library.LOOK_SECONDS = held


def known_round(root: Path, folder: Path) -> int | None:
    found: int | None = json.loads((folder / "live.json").read_text()).get("committed")
    return found
