"""Ways of training by forward passes alone, end to end: learnt, resumed, replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aggregators import FactorScalars, Layout, SeedScalars
from aggregators.gate import GateContext, admit
from aggregators.messages import Plan
from aggregators.methods import FactorMethod
from aggregators.presets import PRESETS
from aggregators.shared_factors import factor_layout
from aggregators.targets import trained_names
from fedclient.base_model import load
from fedserver.configuration import ConfigurationError, RunConfiguration, parse
from fedserver.export import final_change
from fedserver.global_model import GlobalModel, next_model
from fedserver.ledger import Ledger
from fedserver.planner import zeroth_order
from fedserver.replay import replay, restore, states
from fedserver.run_folder import read_layout
from simulations.run import ledger_head, simulate

WAYS: dict[str, dict[str, Any]] = {
    "pro": {"preset": "fedkseed-pro"},
    "block-wise": {"estimator": "block-wise", "blocks": 2, "layers": [0, 2]},
    "sparse": {"estimator": "sparse", "density": 0.2, "learning_rate": 1e-3},
    "hybrid": {"estimator": "hybrid", "cut": 1, "sampling": "magnitude"},
    "lora": {"trains": "lora", "learning_rate": 1e-3},
    "lora-pro": {"preset": "fedkseed-pro", "trains": "lora", "target_modules": ["q_proj"]},
}


@pytest.fixture
def make(
    tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path / "cache"))

    def make(way: str, **changes: Any) -> RunConfiguration:
        zeroth_order = dict(WAYS[way])
        preset = zeroth_order.pop("preset", "fedkseed")
        standard = {"learning_rate": 1e-4, "pool_size": 32, "local_steps": 5}
        values = {
            "base_model": str(tiny_model_folder),
            "preset": preset,
            "rounds": 3,
            "threads": 1,
            "max_length": 48,
            "micro_batch_size": 4,
            "lora_r": 2,
            "evaluate": False,
            "data": {"source": str(tiny_data_file), "held_out_max": 3, "limit_per_node": 16},
            "zeroth_order": standard | zeroth_order,
            "nodes": [{"name": "phone"}, {"name": "cafe"}],
        }
        return parse(values | changes)

    return make


def run(configuration: RunConfiguration, folder: Path, **options: Any) -> None:
    simulate(configuration, folder, lambda event: None, samples=0, **options)


@pytest.mark.parametrize("way", ["block-wise", "hybrid", "lora", "lora-pro"])
def test_a_node_that_found_nothing_has_answered(way: str, make: Any, tmp_path: Path) -> None:
    """No answer of an untrained model matches exactly, whichever way its weights are moved a little."""
    told = WAYS[way] | {"objective": "exact-match"}
    told.pop("preset", None)
    preset = WAYS[way].get("preset", "fedkseed")
    configuration = make(way, rounds=2, preset=preset, quorum=2,
                         zeroth_order={"local_steps": 3, "pool_size": 32, **told})  # fmt: skip
    run(configuration, tmp_path / "run")
    ledger = Ledger(tmp_path / "run")
    for entry in ledger.entries("round"):
        assert entry.content["quorum"]
        for node in entry.content["nodes"]:
            assert node["verdict"] == "accepted"
            # Above the cut LoRA learns, so that the whole reply does change something.
            assert node["report"]["unchanged"] == (way != "hybrid")
    assert all(one.equal for one in replay(ledger, configuration))
    model, _ = restore(ledger, configuration)
    view = model.common_view(PRESETS["fedkseed"], None, None)
    assert view.empty == (way != "hybrid")
    ledger.close()


def test_a_run_sums_what_all_nodes_measured(make: Any, tmp_path: Path) -> None:
    configuration = make("pro")
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
    *_, (_, last) = states(ledger, configuration)
    assert last.statistics == joint
    ledger.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_run_replays_and_one_that_was_interrupted_ends_alike(
    way: str, make: Any, tmp_path: Path
) -> None:
    configuration = make(way)
    run(configuration, tmp_path / "whole")
    run(configuration.model_copy(update={"rounds": 1}), tmp_path / "parts")
    run(configuration, tmp_path / "parts", resume=True)
    assert ledger_head(tmp_path / "parts") == ledger_head(tmp_path / "whole")
    ledger = Ledger(tmp_path / "whole")
    assert [one.equal for one in replay(ledger, configuration)] == [True] * 3
    for entry in ledger.entries("round"):
        assert [node["verdict"] for node in entry.content["nodes"]] == ["accepted"] * 2
    ledger.close()


@pytest.mark.parametrize("way", ["lora", "sparse", "hybrid"])
def test_the_state_is_the_sum_of_the_weighted_means(way: str, make: Any, tmp_path: Path) -> None:
    """Law 2, in float64; of factors a low-rank change, of a mask only what it leaves."""
    configuration = make(way)
    run(configuration, tmp_path / "run")
    ledger = Ledger(tmp_path / "run")
    layout = read_layout(ledger)
    expected: dict[str, torch.Tensor] = {}
    for entry in ledger.entries("round"):
        admitted = [
            admit(
                ledger.get(node["update"]),
                GateContext(layout, Plan.model_validate(node["plan"])),
            )
            for node in entry.content["nodes"]
        ]
        total = sum(one.report.examples for one in admitted)
        for one in admitted:
            assert one.update is not None
            for name, change in one.update.dense().items():
                part = change * (one.report.examples / total)
                expected[name] = expected.get(name, torch.zeros_like(part)) + part
    ledger.close()
    _, view = final_change(tmp_path / "run", exact=True)
    for name, change in expected.items():
        found = view.moved(name, torch.zeros(layout.shape(name))).double()
        assert float((found - change).norm()) <= 1e-4 * float(change.norm()) > 0, name
    assert bool(view.sums) == (way != "lora")


@pytest.mark.parametrize(("way", "part"), [("lora", "carry"), ("sparse", "sums")])
def test_the_weight_of_the_strand_is_that_of_what_it_trains(
    way: str, part: str, make: Any, tiny_model_folder: Path
) -> None:
    """Half the weight, half the change: of factors as of weights."""
    layout = Layout.from_model(load(str(tiny_model_folder)).model)
    method = zeroth_order(make(way))
    names = trained_names(layout, method.target_modules)
    own = layout if way == "sparse" else factor_layout(layout, names, 2)
    update: Any = SeedScalars(
        own, method.master_seed, 32, [3], [2.0**-12], method.probe, reach=method.reach
    )
    if isinstance(method, FactorMethod):
        update = FactorScalars(layout, names, 2, method.scale, method.shared_seed, update)
    changes = []
    for weight in (1.0, 0.5):
        configuration = make(way, mixing={"weights": {"zeroth-order": weight}})
        model, mixed = next_model(GlobalModel.empty(layout), [(update, 7)], configuration)
        assert mixed.shares == [weight]
        held = model.carry.dense() if part == "carry" else model.sums[0].dense()
        changes.append(held[names[0]])
    assert float(changes[0].norm()) > 0
    torch.testing.assert_close(changes[1], changes[0] / 2, rtol=1e-3, atol=1e-9)


def test_sampling_needs_a_bound(make: Any) -> None:
    values = make("pro").model_dump(mode="json", exclude_none=True)
    values["zeroth_order"]["clip"] = None
    with pytest.raises(ConfigurationError, match=r"zeroth_order\.clip"):
        parse(values)
