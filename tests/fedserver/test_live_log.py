"""What a run writes for those who only read its folder: whole lines, and one round to read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fedhost.process_identity import process_identity
from fedserver import events
from fedserver.dashboard.activity import Activity
from fedserver.dashboard.standings import counts
from fedserver.live_log import EVENTS, LIVE, LiveLog, state_of

STARTED = events.RunStarted(
    "tiny", "braid", 2, 1, (events.NodeInfo("a", "rank 2", 3, 1), events.NodeInfo("b", "", 3, 1)),
    "model", "runs/tiny",
)  # fmt: skip
REPLY = events.NodeReplied(2, "a", "accepted", "", "rank 2", 3.0, 2.5, 10, 20, 1.5)


def test_a_reader_who_comes_late_reads_one_round(tmp_path: Path) -> None:
    passed: list[events.Event] = []
    log = LiveLog(tmp_path, passed.append, now=lambda: 5.0)
    said = [
        events.Notice("warning", "before there is a folder"),
        STARTED,
        events.RoundStarted(1),
        events.NodeStarted(1, "a"),
        events.RoundStarted(2),
        events.PhaseStarted(2, "train", 2, 1, 60.0),
        events.NodeStarted(2, "a"),
        events.NodeStarted(2, "b"),
        REPLY,
        *(events.NodeProgress(2, "b", step, 9, 1.0) for step in range(1, 10)),
    ]
    for event in said:
        log(event)
    assert passed == said
    lines = (tmp_path / EVENTS).read_text().splitlines()
    written = [json.loads(line) for line in lines]
    # Steps at one moment are one line, and the last step is always one.
    assert [line["step"] for line in written if line["event"] == "node_progress"] == [1, 9]
    assert len(lines) == len(said) - 7
    live = json.loads((tmp_path / LIVE).read_text())
    assert (live["round"], live["phase"], live["quorum"]) == (2, "train", 1)
    activity = Activity(tmp_path / EVENTS, live, None)
    activity.advance(live)
    assert counts(list(activity.nodes.values())) == {"accepted": 1, "working": 1}
    assert activity.nodes["a"]["bytes_up"] == 10
    assert activity.nodes["b"]["step"] == 9
    seen = activity.seen()
    log(events.NodeStarted(2, "c"))
    activity.advance(live)
    assert set(activity.nodes) == {"a", "b", "c"}
    log(events.RoundStarted(3))
    activity.advance(json.loads((tmp_path / LIVE).read_text()))
    assert counts(list(activity.nodes.values())) == {"waiting": 2}
    assert (seen.round, set(seen.nodes)) == (2, {"a", "b"})
    log(events.RoundsEnded("finished"))
    assert state_of(json.loads((tmp_path / LIVE).read_text())) == "finished"


def test_half_a_line_of_a_killed_writer_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_text('{"time": 1, "event": "round_sta')
    log = LiveLog(tmp_path, lambda event: None)
    log(STARTED)
    live = json.loads((tmp_path / LIVE).read_text())
    activity = Activity(tmp_path / EVENTS, live, None)
    activity.advance(live)
    assert set(activity.members) == {"a", "b"}
    log(events.RoundsEnded("stopped"))


def test_a_log_that_cannot_be_written_is_given_up_with_one_notice(tmp_path: Path) -> None:
    passed: list[events.Event] = []
    log = LiveLog(tmp_path / "nowhere", passed.append)
    for event in (STARTED, REPLY, REPLY):
        log(event)
    notices = [event for event in passed if isinstance(event, events.Notice)]
    assert [notice.level for notice in notices] == ["warning"]
    assert [event for event in passed if event not in notices] == [STARTED, REPLY, REPLY]


def test_a_run_whose_process_is_gone_is_interrupted(tmp_path: Path) -> None:
    log = LiveLog(tmp_path, lambda event: None)
    log(STARTED)
    live = json.loads((tmp_path / LIVE).read_text())
    log(events.RoundsEnded("stopped"))
    assert state_of(live) == "running"
    assert state_of(live | {"phase": "paused"}) == "paused"
    child = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)
    identity = process_identity(child.pid)
    child.wait()
    assert state_of(live | {"process": identity}) == "interrupted"
    # Another process with that number is another process.
    assert state_of(live | {"process": f"{os.getpid()}@1"}) == "interrupted"
    assert state_of(live | {"host": "elsewhere", "process": identity}) == "running"
