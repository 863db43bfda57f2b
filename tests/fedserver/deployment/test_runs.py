"""What is seen of a deployed run from outside of its process."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedserver import events
from fedserver.deployment.runs import LogTail
from fedserver.live_log import EVENTS, LiveLog

RUN = events.RunStarted("run", "braid", 9, 1, (), "model", "folder")


@given(cuts=st.lists(st.integers(0, 400), max_size=8), texts=st.lists(st.text(), max_size=5))
def test_a_log_is_read_once_however_it_grows(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    tail = LogTail(folder)
    assert list(tail.read()) == []
    notices = [events.Notice("info", text) for text in texts]
    told: list[events.Event] = [RUN, *notices, events.RoundsEnded("finished")]
    log = LiveLog(folder, lambda event: None, now=lambda: 12.5)
    for event in told:
        log(event)
    content = (folder / EVENTS).read_bytes()
    heard: list[events.Event] = []
    for size in [*sorted(cuts), len(content)]:
        (folder / EVENTS).write_bytes(content[:size])
        for event in tail.read():
            assert tail.now() == 12.5
            heard.append(event)
    assert heard == told
    # Whoever begins to look now hears nothing of what was.
    assert list(LogTail(folder).read()) == []
