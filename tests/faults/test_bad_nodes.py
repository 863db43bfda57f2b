"""Nodes that misbehave get a typed verdict; the round, the run and the others' work go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedserver import events
from fedserver.configuration import load
from fedserver.ledger import Ledger
from simulations.run import simulate

VERDICTS = {
    "nan": "not_finite",
    "shape": "shape",
    "layout": "wrong_layout",
    "never": "missing",
    "crash": "failed",
    "late": "missing",
}

SCENARIO = """
base_model = "{model}"
rounds = 2
seed = 5
threads = 1
local_steps = 2
max_length = 48
deadline_seconds = 5.0
quorum = 2

[data]
source = "{data}"
held_out_max = 3
limit_per_node = 16

[[nodes]]
name = "first"
lora_r = 4

[[nodes]]
name = "second"
lora_r = 2

[[nodes]]
name = "bad"
lora_r = 2
fault = "{fault}"
"""


@pytest.mark.parametrize("fault", [*VERDICTS, "twice"])
def test_a_bad_node_costs_only_itself(
    fault: str, tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO.format(model=tiny_model_folder, data=tiny_data_file, fault=fault))
    replies: list[events.NodeReplied] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.NodeReplied):
            replies.append(event)

    summary = simulate(load(str(path)), tmp_path / "run", listen, samples=0)
    assert summary["after"]["loss"] < summary["before"]["loss"]
    rounds = _rounds(tmp_path / "run")
    assert [r["quorum"] for r in rounds] == [True, True]
    for entry in rounds:
        honest = [n for n in entry["nodes"] if n["node"] != "bad"]
        assert [n["verdict"] for n in honest] == ["accepted", "accepted"]
        mine = [n for n in entry["nodes"] if n["node"] == "bad" and n["round"] == entry["number"]]
        if fault == "twice":
            assert [n["verdict"] for n in mine] == ["accepted", "duplicate"]
        else:
            assert [n["verdict"] for n in mine] == [VERDICTS[fault]]
            assert sum(n["share"] for n in honest) == pytest.approx(1.0)
            assert all(n["reason"] for n in mine)
    assert {r.verdict for r in replies if r.node != "bad"} == {"accepted"}
    if fault == "late":
        late = [n for n in rounds[1]["nodes"] if n["verdict"] == "late"]
        assert [n["round"] for n in late] == [1]


def test_a_round_below_its_quorum_changes_nothing(
    tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "scenario.toml"
    text = SCENARIO.format(model=tiny_model_folder, data=tiny_data_file, fault="nan")
    path.write_text(text.replace("quorum = 2", "quorum = 3"))
    summary = simulate(load(str(path)), tmp_path / "run", lambda event: None, samples=0)
    assert [r["quorum"] for r in _rounds(tmp_path / "run")] == [False, False]
    # Over the nodes that evaluated both, the untouched model scores as it did.
    assert summary["after"] == summary["before"]


def _rounds(folder: Path) -> list[dict[str, object]]:
    ledger = Ledger(folder)
    try:
        assert ledger.verify() == []
        return [{**entry.content, "number": entry.round} for entry in ledger.entries("round")]
    finally:
        ledger.close()
