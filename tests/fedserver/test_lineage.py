"""The names of residuals follow the history that a round's model really has."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aggregators.messages import MOST_HISTORY
from fedserver.entry import GENESIS_PREVIOUS, Entry, canonical, entry_hash
from fedserver.lineage import Lineage


class Chain:
    """Entries as a ledger would hold them, and the lineage that has taken them in."""

    def __init__(self) -> None:
        self.head, self.height, self.number = GENESIS_PREVIOUS, 0, 0
        self.lineage = Lineage()
        self.add("genesis", 0, {})

    def add(self, kind: str, number: int, content: dict[str, Any]) -> None:
        digest = entry_hash(self.height, kind, number, canonical(content), self.head)
        self.lineage.take_in(
            Entry(self.height, kind, number, content, self.head, digest, {}, {}, b"")
        )
        self.head, self.height = digest, self.height + 1

    def round(self, edge: str = "", **verdicts: str) -> str:
        """One round, of nodes behind ``edge`` if it says one; returns what it is called."""
        name = self.head
        self.number += 1
        plan = {"round": self.number, "action": "train", "method": {}}
        rows = [
            {"node": node, "verdict": verdict, "plan": plan} for node, verdict in verdicts.items()
        ]
        if edge:
            behind = [(node, "0" * 32, 1) for node in verdicts]
            method = {"groups": [{"action": "train", "members": behind}]}
            accepted = "accepted" in verdicts.values()
            rows = [
                {
                    "node": edge,
                    "verdict": "accepted" if accepted else "failed",
                    "plan": plan | {"method": method},
                    **({"members": rows} if accepted else {}),
                }
            ]
        self.add("round", self.number, {"quorum": True, "nodes": rows, "state": "the same"})
        return name

    def roll_back(self, to: int) -> None:
        content = {"action": "rollback", "arguments": {"round": to}, "state": "the same"}
        self.add("operator", self.number + 1, content)


STEPS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"a": st.sampled_from(["accepted", "missing", "not asked"])}),
        st.integers(0, 30),
    ),
    max_size=25,
)


@given(STEPS, st.sampled_from(["", "edge"]))
def test_a_history_names_the_rounds_that_asked_and_stand(steps: list[Any], edge: str) -> None:
    chain = Chain()
    asked: list[tuple[int, str]] = []
    # By round, what had been asked when it was committed: a roll-back may go to any line.
    after = {0: asked}
    for step in steps:
        if isinstance(step, int):
            if step >= chain.number:
                continue
            chain.roll_back(step)
            asked = after[step]
        elif step["a"] == "not asked":
            chain.round(edge, b="accepted")
        else:
            name = chain.round(edge, a=step["a"], b="missing")
            asked = [*asked, (chain.number, name)]
        after[chain.number] = after.get(chain.number, asked)
        first, *rest = chain.lineage.history("a")
        assert first == chain.head
        assert rest == [name for _, name in asked][::-1][: MOST_HISTORY - 1]
        assert len({first, *rest}) == len(rest) + 1


def test_what_changes_no_model_renames_no_round() -> None:
    """Else a pause would ask nodes again whose replies are here."""
    chain = Chain()
    chain.round(a="accepted")
    before = chain.lineage.history("a")
    chain.add("operator", 2, {"action": "pause", "arguments": {}})
    chain.add("evaluation", 1, {"nodes": []})
    assert chain.lineage.history("a") == before


def test_rounds_that_only_differ_in_who_took_part_have_unlike_names() -> None:
    one, other = Chain(), Chain()
    assert one.lineage.history("a") == other.lineage.history("a")
    one.round(a="late", b="accepted")
    other.round(b="accepted")
    assert one.lineage.history("a")[0] != other.lineage.history("a")[0]


def test_a_line_that_was_left_comes_back_whole() -> None:
    chain = Chain()
    names = [chain.round(a="accepted") for _ in range(4)]
    chain.roll_back(2)
    chain.round(a="accepted")
    chain.roll_back(4)
    assert chain.lineage.history("a")[1:] == tuple(reversed(names))
