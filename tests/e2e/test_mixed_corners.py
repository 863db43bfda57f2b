"""Corners of mixed cohorts, each of which was wrong once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aggregators import LowRank
from aggregators.index_coding import decode_indices, encode_indices
from aggregators.methods import FactorMethod
from aggregators.shared_factors import factor_layout
from aggregators.targets import trained_names
from aggregators.view import View
from fedclient import quantised_base
from fedclient.beside import standing, standing_on
from fedclient.local.perturbation import factored
from fedclient.local.zeroth_order import scope_of
from fedclient.loss import answer_loss
from fedserver.configuration import ConfigurationError, RunConfiguration, parse
from fedserver.ledger import Ledger
from fedserver.run_folder import recorded_configuration
from simulations.run import simulate


@pytest.fixture
def verdicts(
    tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Runs a small scenario; returns the verdicts of all its rounds and what its ledger says it is."""
    monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path / "cache"))

    def run(nodes: Any, **changes: Any) -> tuple[list[str], RunConfiguration]:
        values: dict[str, Any] = {
            "base_model": str(tiny_model_folder), "preset": "mixed", "rounds": 2, "threads": 1,
            "local_steps": 2, "max_length": 48, "lora_r": 3, "micro_batch_size": 4,
            "data": {"source": str(tiny_data_file), "held_out_max": 3, "limit_per_node": 16},
            "zeroth_order": {"learning_rate": 1e-3, "pool_size": 64, "local_steps": 3},
            "projected": {"learning_rate": 1e-3, "coordinates": 200}, "nodes": nodes,
        }  # fmt: skip
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
        simulate(parse(values), tmp_path / "run", lambda event: None, samples=0)
        ledger = Ledger(tmp_path / "run")
        found = [n["verdict"] for e in ledger.entries("round") for n in e.content["nodes"]]
        recorded = recorded_configuration(ledger)
        ledger.close()
        return found, recorded

    return run


@pytest.mark.parametrize("base_format", ["full", "nf4"])
def test_lora_nodes_stand_on_matrices_that_only_others_change(
    base_format: str, verdicts: Any
) -> None:
    nodes = [{"name": "a", "base_format": base_format}, {"name": "b", "strand": "projected"}]
    found, _ = verdicts(
        nodes,
        lora_target_modules=["q_proj"],
        projected={"target_modules": ["all-linear"], "learning_rate": 1e-3},
    )
    assert found == ["accepted"] * 4


@pytest.mark.parametrize("subset", ["owlore", "hft", "green-trainer"])
def test_a_projection_of_a_subset_is_accepted(subset: str, verdicts: Any) -> None:
    nodes = [{"name": name, "strand": "projected"} for name in "ab"]
    found, _ = verdicts(nodes, projected={"basis": "random", "subset": subset})
    assert found == ["accepted"] * 4


@pytest.mark.parametrize("fault", ["nan", "shape"])
@pytest.mark.parametrize("strand", ["lora", "zeroth-order", "projected"])
def test_every_strand_can_misbehave(fault: str, strand: str, verdicts: Any) -> None:
    nodes = [{"name": "a"}, {"name": "b"}, {"name": "c", "strand": strand, "fault": fault}]
    found, _ = verdicts(nodes)
    assert found.count("accepted") == 4
    wrong = set(found) - {"accepted"}
    assert wrong <= ({"not_finite"} if fault == "nan" else {"shape", "malformed"}), wrong


@pytest.mark.parametrize("estimator", ["sparse", "hybrid"])
def test_a_device_is_not_given_a_way_that_the_scenario_refuses(
    estimator: str, verdicts: Any
) -> None:
    phone = {"name": "phone", "strand": "auto", "base_format": "nf4", "backpropagates": False}
    with pytest.raises(ConfigurationError, match="phone"):
        verdicts([{"name": "a"}, phone], zeroth_order={"estimator": estimator})


def test_a_device_that_nothing_suits_is_told_so(verdicts: Any) -> None:
    phone = {"name": "phone", "strand": "auto", "base_format": "nf4"}
    with pytest.raises(ConfigurationError, match="phone"):
        verdicts([{"name": "a"}, phone], zeroth_order={"probe": "rademacher"})


def test_an_asynchronous_round_may_ask_nobody(verdicts: Any) -> None:
    nodes = [{"name": name, "away": [1, 2, 3, 4]} for name in "ab"]
    found, _ = verdicts(
        nodes, rounds=4, asynchronous=True, late="discount", buffer=1, deadline_seconds=5
    )
    assert set(found) <= {"missing"}


def test_late_pairs_count_as_late_factors_and_scalars_do(verdicts: Any) -> None:
    late = {"name": "c", "strand": "zeroth-order", "fault": "late"}
    found, _ = verdicts(
        [{"name": "a"}, {"name": "b"}, late],
        rounds=3, late="discount", deadline_seconds=5, quorum=2,
        zeroth_order={"estimator": "hybrid"},
    )  # fmt: skip
    assert "late" not in found


def test_factors_are_measured_with_the_change_beside_the_head(tiny_model_folder: Path) -> None:
    base = quantised_base.load(str(tiny_model_folder), "float32", "nf4")
    layout, name = base.layout, "model.embed_tokens.weight"
    chance = torch.Generator().manual_seed(0)
    rows, columns = layout.shape(name)
    change = LowRank(
        layout,
        {name: (torch.randn(rows, 3, generator=chance), torch.randn(3, columns, generator=chance), 0.1)},
    )  # fmt: skip
    ids = torch.randint(4, rows, (2, 12), generator=chance)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    method = FactorMethod(
        target_modules=("all-linear",), master_seed=1, pool_size=8, probe="rank1", epsilon=1e-3,
        clip=None, rank=3, scale=1.0, shared_seed=2,
    )  # fmt: skip
    own = factor_layout(layout, trained_names(layout, method.target_modules, None), 3)
    with standing_on(base.model, layout, standing(base, View(adapter=change))):
        with torch.no_grad():
            summed, labelled, _ = answer_loss(base.model, batch)
        with factored(base.model, layout, own, method, scope_of(layout, own, method)) as asked:
            found = asked.predictions(batch, [(0, 0.0)])[0].loss
    assert found == pytest.approx(float(summed) / labelled, rel=1e-5)


def test_coded_indices_are_no_longer_than_they_can_be() -> None:
    with pytest.raises(ValueError, match="no code"):
        decode_indices(b"\0" + b"\xff" * (1 << 16), 1, 64)
    for chosen, end in (([0], 1), ([63], 64), (list(range(64)), 64), ([(1 << 24) - 1], 1 << 24),
                        ([(1 << 40) - 1], 1 << 40)):  # fmt: skip
        assert decode_indices(encode_indices(chosen), len(chosen), end) == chosen
