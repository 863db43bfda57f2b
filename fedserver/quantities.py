"""Numbers as people read them: bytes, durations, losses and changes. None becomes a dash."""

from __future__ import annotations

from collections.abc import Sequence

MISSING = "–"
MINUS = "\u2212"


def bytes_text(count: float | None) -> str:
    """A byte count in decimal units with three significant digits: 1.24 MB."""
    if count is None:
        return MISSING
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(size) < 999.5 or unit == "PB":
            break
        size /= 1000
    if unit == "B":
        return f"{size:.0f} B"
    return f"{_three_digits(size)} {unit}"


def bytes_tick(count: float) -> str:
    """The same for the round numbers of an axis: 20 MB, not 20.0 MB."""
    number, _, unit = bytes_text(count).partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def duration_text(seconds: float | None) -> str:
    """A duration at the precision that matters: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None or not 0 <= seconds < 1e9:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def loss_text(value: float | None) -> str:
    """A loss with three decimals; very large ones in powers of ten."""
    if value is None:
        return MISSING
    return signed(f"{value:.3f}") if abs(value) < 1e4 else signed(f"{value:.3g}")


def share_text(value: float | None, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage."""
    if value is None:
        return MISSING
    return signed(f"{100 * value:,.{digits}f}") + "\u202f%"


def count_text(value: float | None) -> str:
    """A count with thousands separators."""
    return MISSING if value is None else signed(f"{value:,.0f}")


def number_text(value: float | None, digits: int = 4) -> str:
    """Any other number with a few significant digits."""
    return MISSING if value is None else signed(f"{value:.{digits}g}")


def change_text(before: float | None, after: float | None) -> str:
    """The relative change as a percentage with its sign; "" where it has no meaning."""
    change = relative_change(before, after)
    if change is None:
        return ""
    return signed(f"{100 * change:+,.1f}") + "\u202f%"


def relative_change(before: float | None, after: float | None) -> float | None:
    """(after - before) / before, None unless before is positive."""
    if before is None or after is None or before <= 0:
        return None
    return after / before - 1


def plural(count: int, noun: str) -> str:
    """ "1 node", "6 nodes"; "reply" becomes "replies"."""
    if count == 1:
        return f"1 {noun}"
    ending = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count:,} {ending}"


def of_nodes(count: int, of: int) -> str:
    """ "all nodes", "5 of 6 nodes"."""
    if count == of:
        return "all nodes" if of > 1 else "the one node"
    return f"{count:,} of {plural(of, 'node')}"


def spans_text(numbers: Sequence[int]) -> str:
    """Rounds in order as they read: "rounds 2, 5 to 9"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    told = ", ".join(" to ".join(map(str, span)) for span in spans)
    return f"{'round' if len(numbers) == 1 else 'rounds'} {told}"


def signed(content: str) -> str:
    """The same with a true minus sign."""
    return content.replace("-", MINUS) if "e-" not in content else content


def _three_digits(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
