"""Cosines between nodes' changes are those of the dense changes, whatever the families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aggregators import Sketch
from aggregators.gate import GateContext, admit
from aggregators.messages import Plan
from aggregators.pair import parts_of
from fedserver.configuration import parse
from fedserver.global_model import first_basis
from fedserver.ledger import Ledger, LedgerError
from fedserver.likeness import likeness
from fedserver.replay import model_after
from fedserver.run_folder import read_layout
from simulations.run import simulate

NODES = [
    {"name": "a"},
    {"name": "b", "strand": "projected"},
    {"name": "c", "strand": "zeroth-order"},
    {"name": "d", "fault": "nan"},
]


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 2},
        {
            "projected": {"basis": "random", "learning_rate": 1e-3, "coordinates": 200},
            "zeroth_order": {"estimator": "hybrid", "learning_rate": 1e-3, "pool_size": 64},
        },
        {
            "nodes": [NODES[0], {**NODES[2], "name": "b"}, NODES[2]],
            "zeroth_order": {"trains": "lora", "learning_rate": 1e-3, "pool_size": 64},
        },
    ],
)
def test_cosines_are_those_of_the_dense_changes(
    changes: dict[str, Any],
    tiny_model_folder: Path,
    tiny_data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDBRAID_CACHE", str(tmp_path / "cache"))
    values = {
        "base_model": str(tiny_model_folder), "preset": "mixed", "rounds": 1, "threads": 1,
        "local_steps": 2, "max_length": 48, "lora_r": 2, "micro_batch_size": 4, "evaluate": False,
        "data": {"source": str(tiny_data_file), "held_out_max": 3, "limit_per_node": 16},
        "zeroth_order": {"learning_rate": 1e-3, "pool_size": 64, "local_steps": 3},
        "projected": {"learning_rate": 1e-3}, "nodes": NODES, **changes,
    }  # fmt: skip
    configuration = parse(values)
    simulate(configuration, tmp_path / "run", lambda event: None, samples=0)
    ledger = Ledger(tmp_path / "run")
    found = likeness(ledger, configuration, configuration.rounds, probes=400)
    assert found.nodes == ("a", "b", "c")
    layout = read_layout(ledger)
    basis = model_after(ledger, configuration, configuration.rounds - 1).basis
    basis = basis or first_basis(configuration, layout)
    dense = []
    *_, entry = ledger.entries("round")
    for row in entry.content["nodes"][:3]:
        context = GateContext(layout, Plan.model_validate(row["plan"]), basis=basis)
        total = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in layout}
        for part in parts_of(admit(ledger.get(row["update"]), context).update):
            if isinstance(part, Sketch):
                change = part.reconstruct(basis).dense() | part.whole_change().dense()
            else:
                change = part.dense()
            for name, tensor in change.items():
                total[name] += tensor
        dense.append(torch.cat([tensor.flatten() for tensor in total.values()]))
    lengths = torch.stack([change.norm() for change in dense])
    cosines = torch.stack(dense) @ torch.stack(dense).T / lengths / lengths[:, None]
    assert float((found.cosines - cosines).abs().max()) < 6 * found.error
    assert float((found.lengths / lengths - 1).abs().max()) < 6 * found.error
    with pytest.raises(LedgerError, match="round 9"):
        likeness(ledger, configuration, 9)
    ledger.close()
