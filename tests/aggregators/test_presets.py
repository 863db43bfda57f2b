"""Presets are data that fit together: every one of them makes a plan that both sides can follow."""

from __future__ import annotations

import pytest

from aggregators.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_plan(make_plan, name):
    preset = PRESETS[name]
    plan = make_plan(
        preset=preset.name,
        init=preset.init,
        train_a=preset.train_a,
        start=preset.start,
        sends=preset.sends,
    )
    assert plan.preset == name


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_what_a_preset_sends_fits_what_the_server_does(preset):
    assert preset.summary
    # The server can put back an A that it did not get only where all nodes have the shared one.
    assert preset.train_a or (preset.init == "shared" and preset.sends == "factors")
    # Sums of factors that start from the global view would count the view once a node.
    if preset.start == "view":
        assert preset.sends == "delta" or preset.server == "average_factors"
    else:
        assert (preset.sends, preset.server) == ("factors", "add")


def test_the_published_methods_are_there():
    assert set(PRESETS) == {
        "braid", "flora", "fedit", "ffa-lora", "flexlora", "fedkseed", "fedkseed-pro", "ferret",
        "braid-projected", "mixed",
    }  # fmt: skip
