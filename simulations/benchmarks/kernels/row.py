"""One line of the kernel benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """What one primitive took, and what that is to be compared with.

    Attributes:
        family: subject of the module that measured it, e.g. "probes".
        name: the primitive and its sizes, e.g. "replay rademacher 2048 x 2048, K 1024".
        seconds: of one call; the median or the minimum of several.
        reference_seconds: of what it is compared with, on the same data in the same run.
        reference: what that is, in words.
        floor_seconds: what the machine needs at least, e.g. to read and write the weights once.
        floor: what that floor is, in words.
        target: the bar that the project sets itself, in words, e.g. "≥ 25 ×".
        extra: further figures by name; units belong into the name.
    """

    family: str
    name: str
    seconds: float
    reference_seconds: float | None = None
    reference: str = ""
    floor_seconds: float | None = None
    floor: str = ""
    target: str = ""
    extra: dict[str, float | str] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times faster than the reference; None without one."""
        return None if self.reference_seconds is None else self.reference_seconds / self.seconds

    @property
    def floor_share(self) -> float | None:
        """The floor's share of the time, 1 at the machine's limit; None without a floor."""
        return None if self.floor_seconds is None else self.floor_seconds / self.seconds
