"""What a comparison makes of one scenario for each of its variants."""

from __future__ import annotations

import pytest

from aggregators.presets import PRESETS
from fedserver.configuration import load
from simulations.compare import changes_of


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_run_the_mixed_scenario(preset: str) -> None:
    """Whatever its nodes hold and how they train there."""
    found = load("mixed", changes_of(preset, "mixed"))
    strands = {found.strand(node.name) for node in found.nodes}
    wanted = PRESETS[preset].strand
    assert wanted is None or strands == {wanted}
    for node in found.nodes:
        if found.strand(node.name) == "projected":
            assert found.base_format_of(node.name) == "full"
