"""The server's state: what nodes see of it, and what is evaluated and exported."""

from __future__ import annotations

import torch

from aggregators import Layout, LowRank
from aggregators.presets import PRESETS
from fedserver.configuration import parse
from fedserver.global_model import GlobalModel, next_model

LAYOUT = Layout({"layer.weight": (12, 10)})


def update(seed: int, rank: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(12, rank, generator=generator), torch.randn(rank, 10, generator=generator)
    return LowRank(LAYOUT, {"layer.weight": (b, a, 1.0)})


def after_one_round(preset: str) -> GlobalModel:
    return next_model(
        GlobalModel.empty(LAYOUT),
        [(update(1, 5), 10), (update(2, 2), 30)],
        parse({"preset": preset, "lora_r": 5, "nodes": [{"name": "a"}]}),
    )[0]


def test_fedit_is_evaluated_whole_as_its_nodes_average_it() -> None:
    model = after_one_round("fedit")
    common = model.common_view(PRESETS["fedit"], 3, None)
    assert common.adapter.rank("layer.weight") == 5
    assert model.view(PRESETS["fedit"], 2, 3, None).adapter.rank("layer.weight") == 2


def test_braids_common_view_keeps_to_the_rank_of_the_plan() -> None:
    model = after_one_round("braid")
    assert model.common_view(PRESETS["braid"], 3, None).adapter.rank("layer.weight") == 3
    assert model.common_view(PRESETS["flora"], 3, None).adapter.rank("layer.weight") == 7


def test_a_state_survives_its_bytes() -> None:
    for preset in ("braid", "fedit"):
        model = after_one_round(preset)
        again = GlobalModel.from_bytes(model.to_bytes(), LAYOUT)
        assert again.digest() == model.digest()
        assert (again.adapter is None) == (preset == "braid")
