"""The live view on a terminal, in a log file and as JSON lines."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedserver import events
from simulations.live import LiveView

Timed = list[tuple[float, events.Event]]
MakeEvents = Callable[..., Timed]


class Clock:
    """Seconds that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def terminal(width: int = 100, height: int = 40) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None,
        highlight=False, legacy_windows=False,
    )  # fmt: skip


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def show(
    told: Iterable[tuple[float, events.Event]], console: Console, *, as_json: bool = False
) -> str:
    clock = Clock()
    with LiveView(json=as_json, console=console, clock=clock, auto_refresh=False) as view:
        for now, event in told:
            clock.now = now
            view(event)
    return written(console)


def last_screen(told: Timed, console: Console) -> str:
    """What stands on the terminal after the last event of an unfinished run."""
    clock = Clock()
    view = LiveView(console=console, clock=clock, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), view:
        for now, event in told:
            clock.now = now
            view(event)
        before = len(written(console))
        raise KeyboardInterrupt
    return written(console)[before:]


def plain(told: Iterable[tuple[float, events.Event]], encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    show_console = Console(file=stream, width=80, highlight=False)
    clock = Clock()
    with LiveView(console=show_console, clock=clock) as view:
        for now, event in told:
            clock.now = now
            view(event)
    stream.flush()
    return raw.getvalue().decode(encoding).splitlines()


def test_the_table_shows_every_node_at_work(fake_events: MakeEvents) -> None:
    told = fake_events()
    cut = next(
        i for i, (_, e) in enumerate(told)
        if isinstance(e, events.NodeProgress) and (e.round, e.node, e.step) == (2, "clinic", 3)
    )  # fmt: skip
    screen = last_screen(told[: cut + 1], terminal())
    for head in ("round", "node", "sends", "steps", "loss", "up", "down", "verdict"):
        assert head in screen
    rows = {line.split()[0]: line for line in screen.splitlines() if line.strip()}
    rows["reception"] = next(line for line in screen.splitlines() if "reception" in line)
    assert "accepted" in rows["reception"]
    assert "4.88 MB" in rows["reception"]
    assert "9.76 MB" in rows["reception"]
    assert "3/6" in rows["clinic"]
    assert "working" in rows["clinic"]
    assert "waiting" in rows["cafe"]
    # Round 1 is committed, but its model is evaluated by the replies of round 2.
    assert any(line.startswith("round 1/3") for line in screen.splitlines())
    assert "left" in screen
    assert "elapsed" in screen


def test_finished_rounds_stay_above_the_table_in_order(fake_events: MakeEvents) -> None:
    screen = show(fake_events(), terminal())
    places = [
        screen.rindex(line) for line in ("base  ", "round 1/3", "round 2/3   loss", "round 3/3")
    ]
    assert places == sorted(places)
    assert "loss 2.493 (−0.400)" in screen
    assert "5/6 accepted" in screen


def test_a_refused_reply_is_named_with_its_reason(fake_events: MakeEvents) -> None:
    told = fake_events()
    for lines in (show(told, terminal(200)).splitlines(), plain(told)):
        line = next(line for line in lines if "newsroom refused" in line)
        assert "not finite" in line
        assert "q_proj" in line


def test_the_end_sums_up(fake_events: MakeEvents) -> None:
    told = fake_events()
    for text in (show(told, terminal()), "\n".join(plain(told))):
        for words in (
            "2.893",
            "1.693",
            "41.5 %",
            "17 accepted, 1 refused",
            "1 min 48 s",
            "ab" * 32,
        ):
            assert words in text.replace("\u202f", " ")
        assert "runs/x/report.html" in text
        assert "runs/x/adapter" in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("height", [8, 24])
def test_any_terminal_size_works(fake_events: MakeEvents, width: int, height: int) -> None:
    console = terminal(width, height)
    cut = fake_events()[:60]
    screen = last_screen(cut, console)
    assert "elapsed" in screen or width < 80
    for line in screen.splitlines():
        assert len(line.split("\r")[-1].replace("\x1b[2K", "").replace("\x1b[1A", "")) <= width + 30


def test_a_large_cohort_fits_the_terminal(fake_events: MakeEvents, fake_node: type) -> None:
    nodes = [fake_node(f"node-{i:03d}", 4, (), "phone") for i in range(60)]
    told = fake_events(nodes=nodes, steps=1)
    screen = last_screen(told[:99], terminal(height=30))
    assert len(screen.splitlines()) <= 32
    assert "working" in screen
    assert "more:" in screen


def test_a_log_file_gets_whole_lines_and_no_control_codes(fake_events: MakeEvents) -> None:
    lines = plain(fake_events())
    assert all(line.isprintable() for line in lines)
    assert sum("accepted, rank" in line for line in lines) == 17
    assert [line.split(" begins")[0] for line in lines if " begins" in line] == [
        "round 1", "round 2", "round 3",
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_log_file_of_any_encoding_can_be_written(fake_events: MakeEvents, encoding: str) -> None:
    told = [*fake_events()[:1], (0.0, events.Notice("info", "名前 and naïve"))]
    assert any("and na" in line for line in plain(told, encoding))


def test_json_lines_are_the_events(fake_events: MakeEvents) -> None:
    told = fake_events()
    console = Console(file=io.StringIO(), force_terminal=True)
    lines = show(told, console, as_json=True).splitlines()
    assert [json.loads(line) for line in lines] == [
        json.loads(json.dumps(events.to_json(event))) for _, event in told
    ]


@given(
    words=st.text(max_size=40)
    | st.sampled_from(["[red]x[/red]", "\x1b[2Jx", "a\nround 9/9 loss 0"])
)
def test_a_nodes_words_can_neither_move_the_cursor_nor_forge_a_line(words: str) -> None:
    info = events.NodeInfo(words, words, 10, 2, words)
    told: Timed = [
        (0.0, events.RunStarted(words, words, 2, 1, (info,), words, words)),
        (0.0, events.RoundStarted(1)),
        (1.0, events.NodeProgress(1, words, 1, 2, 1.0)),
        (1.0, events.NodeReplied(1, words, words or "failed", words, words, None, None, 1, 1, 1.0)),
        (1.0, events.Notice("info", words)),
        (2.0, events.RunFinished(None, None, 2.0, words, words, words)),
    ]
    harmless = [line for line in plain(told) if line]
    assert len(harmless) <= 11
    assert all(line.isprintable() for line in harmless)
    on_terminal = last_screen(told[:-1], terminal(300))
    assert "\x1b[2J" not in on_terminal
    assert "[red]" in on_terminal or "[red]" not in words


def test_the_table_is_redrawn_in_the_background(fake_events: MakeEvents) -> None:
    console = terminal()
    with LiveView(console=console) as view:
        for _, event in fake_events():
            view(event)
    assert "quickstart finished" in written(console)


def test_before_the_first_event_it_says_that_it_starts() -> None:
    console = terminal()
    with LiveView(console=console, clock=lambda: 0.0, auto_refresh=False):
        pass
    assert "starting" in written(console)


def test_a_late_round_of_many_is_told_apart_from_who_replied() -> None:
    nodes = (events.NodeInfo("alpha", "rank 8", 10, 2),)
    started = events.RunStarted("long", "braid", 400, 1, nodes, "model", "runs/long")
    reply = events.NodeReplied(256, "alpha", "accepted", "", "rank 8", 2.0, 1.0, 5, 5, 1.0)
    text = show(
        [
            (0.0, started),
            (1.0, events.RoundStarted(256)),
            (2.0, reply),
            (3.0, dataclasses.replace(reply, verdict="not_finite")),
        ],
        Console(file=io.StringIO(), width=100),
    )
    assert "round 256/400 alpha accepted" in text
    assert "round 256/400 alpha refused" in text
