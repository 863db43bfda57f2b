"""The server's hand: it seals every entry that is appended, and says in a checkpoint where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aggregators.keys import load, load_or_create, public_hex
from fedserver import checkpoint
from fedserver.blobs import write_durably
from fedserver.entry import GENESIS_PREVIOUS
from fedserver.ledger import KEYS
from fedserver.merkle import GrowingTree
from fedserver.statements import checkpoint_statement, entry_statement, seal

SERVER_KEY = "server.pem"


def server_key_file(folder: Path) -> Path:
    """Where the key that seals a run lies unless its operator chose another place."""
    return folder / KEYS / SERVER_KEY


class Sealer:
    """Seals one ledger with one key. ``head`` is the hash of the last entry that it counts."""

    def __init__(self, folder: Path, key_file: Path | None, *, fresh: bool) -> None:
        """``fresh``: no entry is sealed yet, so a key may be made. Raises KeyFileError."""
        path = (key_file or server_key_file(folder)).expanduser()
        self._folder = folder
        self._private = load_or_create(path) if fresh else load(path)
        self.key = public_hex(self._private)
        self.head = GENESIS_PREVIOUS
        self._last_seal = ""
        self._tree = GrowingTree()

    def resume(self, entries: Sequence[tuple[str, str]]) -> str:
        """Go on after entries (hash, seal); "", or what speaks against it."""
        found = checkpoint.read_checkpoint(self._folder)
        if entries or found:
            problem = checkpoint.checkpoint_problem(found, entries, self.key)
            if problem:
                return problem
        for entry, text in entries:
            self.follow(entry, text)
        return ""

    def seal(
        self, height: int, kind: str, round_number: int, entry: str, wall: str, signatures: str
    ) -> str:
        """The seal of the entry that comes next; it counts once ``follow`` has heard of it."""
        tree = self._tree.copy()
        tree.append(bytes.fromhex(entry))
        statement = entry_statement(
            height=height,
            kind=kind,
            round_number=round_number,
            entry=entry,
            wall=wall,
            signatures=signatures,
            previous_seal=self._last_seal,
            root=tree.root(),
        )
        return seal(statement, self._private)

    def follow(self, entry: str, text: str) -> None:
        """Count an entry that is in the ledger, with its seal."""
        self._tree.append(bytes.fromhex(entry))
        self.head, self._last_seal = entry, text

    def write_checkpoint(self) -> None:
        """Write where the ledger stands. Raises OSError."""
        statement = checkpoint_statement(
            entries=self._tree.size,
            head=self.head,
            last_seal=self._last_seal,
            root=self._tree.root(),
        )
        path = self._folder / checkpoint.FILE
        write_durably(path, seal(statement, self._private).encode())
