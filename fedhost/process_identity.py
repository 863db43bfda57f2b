"""Which process a number means: numbers are given anew, also while something that noted one runs on."""

from __future__ import annotations

from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def process_identity(pid: int, *, unreaped: bool = False) -> str:
    """A process's number with its start, so that a later process of the same number is another.

    "" if it has gone. ``unreaped``: one that has ended counts until its parent has asked how. The start
    is in ticks since the machine's: a time of day would change whenever somebody sets the clock.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "" if Path("/proc/self/stat").exists() else _without_proc(pid, unreaped)
    # Two starts of a small machine are alike: the same number at the same tick.
    boot = BOOT.read_text(encoding="ascii").strip() if BOOT.exists() else ""
    return "" if fields[0] in "ZX" and not unreaped else f"{pid}@{fields[19]}@{boot}"


def number_of(identity: str) -> int:
    """The process's number. Raises ValueError for a text that is no identity."""
    return int(identity.partition("@")[0])


def is_alive(identity: str) -> bool:
    """Whether that process, and no later one of its number, still runs; a text that is none does not."""
    number = identity.partition("@")[0]
    # No system numbers its processes beyond ten digits; a text of more may be of any length.
    return len(number) <= 10 and number.isdecimal() and process_identity(int(number)) == identity


def _without_proc(pid: int, unreaped: bool) -> str:
    # Only the processes that need it pay for it.
    import psutil

    try:
        process = psutil.Process(pid)
        gone = process.status() == psutil.STATUS_ZOMBIE and not unreaped
        return "" if gone else f"{pid}@{process.create_time()}"
    except psutil.NoSuchProcess:
        return ""
