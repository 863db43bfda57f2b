"""Quorum, grace, late updates, participation, asynchronous rounds: deterministic, resumed and replayed.

Every rule is run over real small models, left alone and interrupted, and its ledger replayed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from fedserver import events
from fedserver.configuration import ConfigurationError, RunConfiguration, load
from fedserver.ledger import Ledger
from fedserver.replay import replay
from simulations.run import ledger_head, simulate

SCENARIO = """
base_model = "{model}"
rounds = 3
seed = 5
threads = 1
local_steps = 1
max_length = 48
deadline_seconds = 5.0
lora_r = 2

[data]
source = "{data}"
held_out_max = 2
limit_per_node = 12

[[nodes]]
name = "a"

[[nodes]]
name = "b"

[[nodes]]
name = "c"

[[nodes]]
name = "d"
"""
MIXED = [
    "preset=mixed",
    "nodes.b.strand=zeroth-order",
    "zeroth_order.local_steps=2",
    "zeroth_order.pool_size=16",
]
RULES = {
    "quorum and grace": ["quorum=0.5", "grace_seconds=0"],
    "late updates": ["quorum=2", "late=discount", "nodes.d.fault=late"],
    "late updates beyond a quorum": ["quorum=2/4", "grace_seconds=0", "late=discount"],
    "participation": ["participation=0.5"],
    "asynchronous": ["asynchronous=true", "late=discount", "buffer=2"],
}


@pytest.fixture
def scenario(tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO.format(model=tiny_model_folder, data=tiny_data_file))
    return path


class Interrupted(BaseException):
    """As SIGINT would: not an error of the node that happens to work."""


def run(configuration: RunConfiguration, folder: Path, stop_at: int | None = None) -> int:
    """Run or go on, up to the event with this number; returns how many there were."""
    heard = 0

    def listen(event: events.Event) -> None:
        nonlocal heard
        heard += 1
        if heard == stop_at:
            raise Interrupted

    with contextlib.suppress(Interrupted):
        simulate(configuration, folder, listen, resume=folder.exists(), samples=0)
    return heard


def rows(folder: Path) -> list[dict[str, Any]]:
    """Every row of every round, with the number of the round that it stands in."""
    ledger = Ledger(folder)
    try:
        assert ledger.verify() == []
        found = [(entry.round, entry.content) for entry in ledger.entries("round")]
        assert all(content["quorum"] for _, content in found)
        return [{**row, "in": number} for number, content in found for row in content["nodes"]]
    finally:
        ledger.close()


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_holds_when_interrupted_and_replayed(
    rule: str, scenario: Path, tmp_path: Path
) -> None:
    configuration = load(str(scenario), [*MIXED, *RULES[rule]])
    count = run(configuration, tmp_path / "whole")
    found = rows(tmp_path / "whole")
    accepted = [(row["node"], row["round"]) for row in found if row["verdict"] == "accepted"]
    assert len(accepted) == len(set(accepted)), "an update was counted twice"
    for row in found:
        late = row["verdict"] == "accepted" and row["round"] < row["in"]
        assert late == ("discount" in row)
        if late:
            assert row["staleness"] == row["in"] - row["round"]
            assert row["discount"] == pytest.approx((1 + row["staleness"]) ** -0.5)
    assert any("discount" in row for row in found) == (configuration.late == "discount")
    _check_rule(rule, found)
    ledger = Ledger(tmp_path / "whole")
    replayed = replay(ledger, configuration)
    ledger.close()
    assert len(replayed) == 3
    assert all(one.equal for one in replayed)
    # Stopped in the middle of a round, early and late.
    for stop_at in (count // 3, 2 * count // 3):
        folder = tmp_path / f"stopped-{stop_at}"
        run(configuration, folder, stop_at)
        run(configuration, folder)
        assert ledger_head(folder) == ledger_head(tmp_path / "whole")


def test_a_late_answer_that_had_arrived_is_not_asked_for_again(
    scenario: Path, tmp_path: Path
) -> None:
    rule = RULES["late updates beyond a quorum"]
    configuration = load(str(scenario), [*MIXED, *rule])
    run(configuration, tmp_path / "whole")
    heard: list[events.Event] = []

    def until_late(event: events.Event) -> None:
        heard.append(event)
        # Two updates close the first round; what comes in the second one is late at first.
        if isinstance(event, events.NodeReplied) and event.round == 2:
            raise Interrupted

    folder = tmp_path / "stopped"
    with contextlib.suppress(Interrupted):
        simulate(configuration, folder, until_late, samples=0)
    late = [event for event in heard if isinstance(event, events.NodeReplied)][-1]
    assert events.NodeStarted(2, late.node) in heard, "it was asked in round 1 and works in round 2"
    again: list[events.Event] = []
    simulate(configuration, folder, again.append, resume=True, samples=0)
    works = [event.node for event in again if isinstance(event, events.NodeStarted)]
    replies = [e.node for e in again if isinstance(e, events.NodeReplied) and e.round == 2]
    assert replies[0] == late.node
    assert works[0] != late.node
    assert ledger_head(folder) == ledger_head(tmp_path / "whole")


def _check_rule(rule: str, found: list[dict[str, Any]]) -> None:
    by_round = [[row for row in found if row["in"] == number] for number in range(1, 4)]
    if rule == "participation":
        assert [len(one) for one in by_round] == [2] * 3
        # By lot: not the same two every time.
        assert len({row["node"] for row in found}) > 2
    elif rule == "asynchronous":
        for one in by_round:
            assert sum(row["verdict"] == "accepted" for row in one) == 2
        # A node that still works is not asked again.
        asked = [(row["node"], row["round"]) for row in found if row["in"] == row["round"]]
        unanswered = {(r["node"], r["round"]) for r in found if r["verdict"] == "missing"}
        answered = {(r["node"], r["round"]): r["in"] for r in found if "discount" in r}
        for node, number in unanswered:
            until = answered.get((node, number), number + 2)
            assert not [n for name, n in asked if name == node and number < n <= until]
    elif rule == "late updates":
        assert {row["node"] for row in found if "discount" in row} == {"d"}


def test_what_a_late_update_changes(scenario: Path, tmp_path: Path) -> None:
    """With the exponent 0 it counts whole: another model, and the same rows but for the discount."""
    heads = set()
    for exponent in ("0.0", "1.0"):
        settings = ["quorum=2", "late=discount", "nodes.d.fault=late", "rounds=2"]
        configuration = load(str(scenario), [*settings, f"staleness_exponent={exponent}"])
        run(configuration, tmp_path / exponent)
        late = [row for row in rows(tmp_path / exponent) if "discount" in row]
        assert [row["discount"] for row in late] == [2 ** -float(exponent)]
        ledger = Ledger(tmp_path / exponent)
        last = ledger.last("round")
        assert last is not None
        heads.add(last.content["state"])
        ledger.close()
    assert len(heads) == 2


def test_a_sketch_of_an_earlier_round_is_refused(scenario: Path, tmp_path: Path) -> None:
    """Its basis is its round's: added to another round's sketches it would be noise."""
    settings = ["preset=mixed", "quorum=2", "late=discount", "rounds=2", "nodes.d.fault=late"]
    configuration = load(str(scenario), [*settings, "nodes.d.strand=projected"])
    run(configuration, tmp_path / "run")
    late = [row for row in rows(tmp_path / "run") if row["round"] < row["in"]]
    assert [row["verdict"] for row in late] == ["late"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["quorum=0/4"], "0/4"),
        (["quorum=5/4"], "5/4"),
        (["quorum=1.5"], "1.5"),
        (["quorum=5"], "quorum 5 exceeds the 4 nodes"),
        (["quorum=3", "participation=0.5"], "train in a round"),
        (["asynchronous=true"], "late = 'discount'"),
        (["buffer=2"], "asynchronous = true"),
        (["buffer=5", "asynchronous=true", "late=discount"], "buffer 5 exceeds"),
        (["asynchronous=true", "late=discount", "grace_seconds=1"], "grace_seconds"),
        (["preset=fedit", "late=discount"], "averages factors"),
        (["participation=0"], "participation"),
        (["staleness_limit=7"], "staleness_limit"),
    ],
)
def test_rules_that_cannot_work_are_refused(wrong: list[str], said: str, scenario: Path) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load(str(scenario), wrong)
