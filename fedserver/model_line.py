"""The rounds that a run's model has come by: all of them, or those that operators' roll-backs left."""

from __future__ import annotations

from fedserver.control import OPERATOR
from fedserver.entry import Entry
from fedserver.ledger import Ledger


class ModelLine:
    """Which round's model is the run's, from its ledger's entries in their order.

    ``rounds``: every round that the model has come by, also those that missed their quorum. ``at``: the
    last of them, 0 for the base model. Numbers only grow, so a roll-back may go to any round, also to
    one that was left before.
    """

    def __init__(self) -> None:
        self.at = 0
        self.rounds: set[int] = set()
        self._after: dict[int, int] = {}
        self._added: set[int] = set()

    @classmethod
    def of(cls, ledger: Ledger, through: int | None = None) -> ModelLine:
        """As it is now, or as it was when round ``through`` was committed."""
        found = cls()
        for entry in ledger.entries():
            found.take_in(entry)
            if entry.kind == "round" and entry.round == through:
                break
        return found

    @property
    def added(self) -> set[int]:
        """The rounds whose accepted updates are in the model."""
        return self.rounds & self._added

    @property
    def model(self) -> int:
        """The round that the model's numbers are of: the last that added to it; 0: the base's."""
        return max(self.added, default=0)

    def take_in(self, entry: Entry) -> None:
        """Go on by one entry."""
        if entry.kind == "round":
            self.commit(entry.round, quorum=entry.content["quorum"])
        elif (target := rolled_back_to(entry)) is not None:
            self.roll_back(target)

    def commit(self, number: int, *, quorum: bool) -> None:
        """Go on by one round."""
        self._after[number] = self.at
        self.at = number
        self.rounds.add(number)
        if quorum:
            self._added.add(number)

    def roll_back(self, number: int) -> None:
        """Go back to the model as a committed round left it, or with 0 to the base model."""
        self.at = number
        self.rounds = set()
        while number:
            self.rounds.add(number)
            number = self._after[number]


def rolled_back_to(entry: Entry) -> int | None:
    """The round that an entry rolls the model back to, 0: the base; None for any other entry."""
    if entry.kind != OPERATOR or entry.content["action"] != "rollback":
        return None
    return int(entry.content["arguments"]["round"])
