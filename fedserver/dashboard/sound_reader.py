"""A run folder as the pages read it: what is not of the kind that it should be is absent."""

from __future__ import annotations

from collections.abc import Collection

from fedserver.dashboard.run_reader import Past, Row, RunReader
from fedserver.dashboard.sound_values import LIVE, SUMMARY, count, sound, sound_nodes, sound_round


class SoundReader(RunReader):
    """A run folder whose files may hold anything."""

    def live(self) -> Row:
        """``live.json``, with the state that it is in now."""
        return sound(super().live(), LIVE)

    def summary(self) -> Row:
        """``summary.json``, empty until the run has finished."""
        return sound(super().summary(), SUMMARY)

    def losses(self) -> tuple[float | None, float | None]:
        """Loss of the base model and the newest evaluation; of neither where one is no number."""
        try:
            return super().losses()
        except (TypeError, ValueError, OverflowError):
            return None, None

    def _read_rounds(self) -> list[Row]:
        return [sound_round(row) for row in super()._read_rounds() if count(row["round"])]

    def _read_past(self, names: Collection[str]) -> dict[str, Past]:
        try:
            return super()._read_past(names)
        except (KeyError, TypeError):
            return {name: Past() for name in names}

    def _read_nodes(self) -> dict[int, list[Row]]:
        return {n: sound_nodes(rows) for n, rows in super()._read_nodes().items() if count(n)}
