"""Seeds drawn by what was measured along them, end to end: learnt, resumed, replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aggregators import SeedScalars
from aggregators.gate import GateContext, admit
from aggregators.messages import Plan
from fedserver.configuration import ConfigurationError, RunConfiguration, parse
from fedserver.global_model import GlobalModel
from fedserver.ledger import Ledger
from fedserver.replay import replay, restore, states
from fedserver.run_folder import read_layout
from simulations.run import ledger_head, simulate


@pytest.fixture
def configuration(
    tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunConfiguration:
    monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path / "cache"))
    return parse(
        {
            "base_model": str(tiny_model_folder),
            "preset": "fedkseed-pro",
            "rounds": 3,
            "threads": 1,
            "max_length": 48,
            "micro_batch_size": 4,
            "evaluate": False,
            "data": {"source": str(tiny_data_file), "held_out_max": 3, "limit_per_node": 16},
            "zeroth_order": {"learning_rate": 1e-4, "pool_size": 32, "local_steps": 5},
            "nodes": [{"name": "phone"}, {"name": "cafe"}],
        }
    )


def run(configuration: RunConfiguration, folder: Path, **options: Any) -> None:
    simulate(configuration, folder, lambda event: None, samples=0, **options)


def test_a_run_sums_what_all_nodes_measured(configuration: Any, tmp_path: Path) -> None:
    run(configuration, tmp_path / "run")
    ledger = Ledger(tmp_path / "run")
    layout = read_layout(ledger)
    joint = None
    for entry in ledger.entries("round"):
        for node in entry.content["nodes"]:
            plan = Plan.model_validate(node["plan"])
            update = admit(ledger.get(node["update"]), GateContext(layout, plan)).update
            assert isinstance(update, SeedScalars)
            assert update.statistics is not None
            joint = update.statistics if joint is None else joint + update.statistics
    model, _ = restore(ledger, configuration)
    assert joint is not None
    assert int(joint.counts.sum()) == 3 * 2 * 5
    assert model.statistics == joint
    assert len(set(joint.levels())) > 2
    assert GlobalModel.from_bytes(model.to_bytes(), layout).digest() == model.digest()
    assert all(one.equal for one in replay(ledger, configuration))
    *_, (_, last) = states(ledger, configuration)
    assert last.statistics == joint
    ledger.close()


def test_a_resumed_run_draws_as_one_that_was_not_interrupted(
    configuration: Any, tmp_path: Path
) -> None:
    run(configuration, tmp_path / "whole")
    run(configuration.model_copy(update={"rounds": 1}), tmp_path / "parts")
    run(configuration, tmp_path / "parts", resume=True)
    assert ledger_head(tmp_path / "parts") == ledger_head(tmp_path / "whole")


def test_sampling_needs_a_bound(configuration: Any) -> None:
    values = configuration.model_dump(mode="json", exclude_none=True)
    values["zeroth_order"]["clip"] = None
    with pytest.raises(ConfigurationError, match=r"zeroth_order\.clip"):
        parse(values)
