"""A run as it happens: a live table on a terminal, lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import json as json_format
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from fedserver import events, quantities
from simulations import live_drawing
from simulations.progress import RunProgress, is_refusal

REFRESH_PER_SECOND = 4
ASCII = str.maketrans(
    {"→": "->", "↑": "up", "↓": "down", "·": "-", "–": "-", "−": "-", "\u202f": " "}
)


class LiveView:
    """Shows the events that it is called with. A context manager, for the terminal's sake.

    Args:
        json: print every event as one JSON object on a line.
        console: where to print; a terminal gets the table, anything else plain lines.
        clock: seconds that only advance.
        auto_refresh: redraw the table in the background, so that the time moves between events.
    """

    def __init__(
        self,
        *,
        json: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        auto_refresh: bool = True,
    ) -> None:
        self._json = json
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._progress = RunProgress()
        self._live: Live | None = None
        # Drawing happens in Live's thread. Nothing is printed while this lock is held: Live takes
        # its own lock first and then asks for the table.
        self._lock = threading.Lock()
        self._started = clock()
        self._auto_refresh = auto_refresh

    def __enter__(self) -> Self:
        if not self._json and self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._draw,
                refresh_per_second=REFRESH_PER_SECOND,
                auto_refresh=self._auto_refresh,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            # After an error the table stays: it shows how far the run was.
            self._live.transient = kind is None
            self._live.stop()
            self._live = None

    def __call__(self, event: events.Event) -> None:
        """Show one event."""
        if self._json:
            print(
                json_format.dumps(events.to_json(event), allow_nan=False),
                file=self._console.file,
                flush=True,
            )
            return
        with self._lock:
            now = self._clock()
            self._progress.apply(event, now)
            terminal = self._live is not None
            lines = self._lines(event, now, terminal=terminal)
        if terminal:
            for line in lines:
                self._console.print(line)
            if self._live is not None and not self._auto_refresh:
                self._live.refresh()
        else:
            for line in lines:
                self._print_plain(line)

    def _draw(self) -> RenderableType:
        with self._lock:
            if self._progress.began is None:
                self._progress.began = self._started
            if self._progress.finished is not None:
                return Text("")
            width, height = self._console.size
            return live_drawing.live_table(
                self._progress, self._clock(), width=width, height=height
            )

    def _lines(self, event: events.Event, now: float, *, terminal: bool) -> list[RenderableType]:
        """What is printed for good because of an event."""
        lines: list[RenderableType] = []
        if isinstance(event, events.RunStarted):
            lines.append(live_drawing.header_text(event))
        elif isinstance(event, events.NodeReplied) and is_refusal(event):
            lines.append(live_drawing.refusal_text(event, self._progress))
        elif isinstance(event, events.Notice):
            lines.append(live_drawing.notice_text(event))
        elif not terminal:
            lines += self._plain_lines(event, now)
        told = self._progress.ready_to_tell()
        width = self._console.width if terminal else None
        lines += [live_drawing.round_text(state, self._progress, width) for state in told]
        if isinstance(event, events.RunFinished):
            if terminal:
                lines.append(live_drawing.summary_panel(self._progress, event))
            else:
                rows = live_drawing.summary_rows(self._progress, event)
                lines += [Text(f"{name}: {value}") for name, value in rows]
        return lines

    def _plain_lines(self, event: events.Event, now: float) -> list[Text]:
        """Lines that a terminal's table shows instead."""
        if isinstance(event, events.RoundStarted):
            remaining = self._progress.remaining(now)
            told = f"round {event.round} begins"
            if remaining is not None:
                told += f", about {quantities.duration_text(remaining)} left"
            return [Text(told)]
        if isinstance(event, events.NodeReplied):
            return [live_drawing.reply_text(event, self._progress)]
        return []

    def _print_plain(self, line: RenderableType) -> None:
        """A line as any encoding can hold it: log files are often ASCII."""
        encoding = self._console.encoding
        text = str(line).translate(ASCII).encode(encoding, "backslashreplace").decode(encoding)
        print(text.rstrip(), file=self._console.file, flush=True)
