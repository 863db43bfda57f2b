"""Where a ledger stands, signed, in a file of its own: so that one that was cut off no longer fits.

It is written once an entry is durable. A crash in between leaves it one entry behind, never ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedserver.merkle import GrowingTree
from fedserver.statements import CHECKPOINT, SealError, open_seal, text_digest

FILE = "checkpoint.json"


def read_checkpoint(folder: Path) -> str:
    """The text of a folder's checkpoint; "" where there is none, or none that could be read."""
    try:
        return (folder / FILE).read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def checkpoint_problem(text: str, entries: Sequence[tuple[str, str]], key: str) -> str:
    """What speaks against a ledger's ``entries`` (hash, seal) by this checkpoint; "" for nothing."""
    if not text:
        return f"{FILE} is missing, so that entries may be missing too"
    try:
        found = open_seal(text)
    except SealError as error:
        return f"{FILE} was changed: {error}"
    if found.key != key or found.predicate_type != CHECKPOINT:
        return f"{FILE} is not a checkpoint by the server's key {key[:16]}"
    count = int(found.predicate["entries"])
    if count > len(entries):
        return f"{FILE} names {count} entries, the ledger has {len(entries)}: its end is missing"
    if count == 0:
        return ""
    tree = GrowingTree()
    try:
        for entry, _ in entries[:count]:
            tree.append(bytes.fromhex(entry))
    except ValueError:
        return f"{FILE} does not fit the ledger: a hash is not one"
    head, last_seal = entries[count - 1]
    says = (found.subject, found.predicate["last_seal"], found.predicate["merkle_root"])
    if says != (head, text_digest(last_seal), tree.root().hex()):
        return f"{FILE} does not fit the ledger: one of the first {count} entries was changed"
    return ""
