"""The base model is never modified: its tensors have the same SHA-256 before and after 50 rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedclient import base_model
from fedserver.configuration import load
from fedserver.ledger import Ledger
from simulations.run import simulate


@pytest.mark.parametrize("preset", ["braid", "flexlora"])
def test_fifty_rounds_leave_the_base_as_it_was(
    preset: str, tiny_scenario: Path, tmp_path: Path
) -> None:
    rounds = 50
    overrides = [f"rounds={rounds}", "local_steps=1", f'preset="{preset}"']
    configuration = load(str(tiny_scenario), overrides)
    base = base_model.load(configuration.base_model)
    before = base_model.digest(base.model)
    on_disk = (base.path / "model.safetensors").read_bytes()
    simulate(configuration, tmp_path / "run", lambda event: None, samples=0)
    ledger = Ledger(tmp_path / "run")
    assert sum(1 for _ in ledger.entries("round")) == rounds
    genesis = ledger.last("genesis")
    ledger.close()
    assert genesis is not None
    assert before == base_model.digest(base.model) == base.digest == genesis.content["base_digest"]
    assert (base.path / "model.safetensors").read_bytes() == on_disk
