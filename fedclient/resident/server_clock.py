"""The server's time, as its answers tell it, carried on by a clock that nobody sets.

A node signs the time of each request, and the server refuses one that is minutes off. A device's
clock may be wrong, or set in the middle of a run; the server that this device pinned says in every
answer what time it is (the Date header), and it is that server which judges.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

# A Date header has whole seconds, and is some time on its way.
CLOSE_SECONDS = 3.0
# What a computer's clock can show; beyond, there is no counting on.
FIRST_YEAR, LAST_YEAR = 1970, 9998
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class ServerClock:
    """What the server's clock shows; this device's own until the server was heard.

    Threads may share one.
    """

    def __init__(self) -> None:
        # One value, so that no thread sees a start of one answer with the moment of another.
        self._set = datetime.now(UTC), time.clock_gettime(_STEADY)

    def now(self) -> datetime:
        """The server's time."""
        start, since = self._set
        return start + timedelta(seconds=time.clock_gettime(_STEADY) - since)

    def hear(self, date: str | None) -> bool:
        """Take an answer's Date header; whether it moved this clock."""
        try:
            told = parsedate_to_datetime(date or "").astimezone(UTC)
        except (ValueError, OverflowError):
            return False
        if not FIRST_YEAR <= told.year <= LAST_YEAR:
            return False
        if abs((told - self.now()).total_seconds()) <= CLOSE_SECONDS:
            return False
        self._set = told, time.clock_gettime(_STEADY)
        return True

    @property
    def device_is_ahead(self) -> float:
        """Seconds by which this device's own clock is ahead of it."""
        return (datetime.now(UTC) - self.now()).total_seconds()
