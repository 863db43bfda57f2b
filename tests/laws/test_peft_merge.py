"""The aggregate of LoRA updates is what peft makes of them with ``combination_type="cat"``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregators import Carry, Layout, LowRank, aggregate

MERGED = "merged"
TOLERANCE = 1e-5


@st.composite
def cohorts(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw for each node its rank, alpha, rsLoRA or not, weight and random factors."""
    node = st.fixed_dictionaries(
        {
            "rank": st.integers(1, 12),
            "alpha": st.integers(1, 64),
            "rslora": st.booleans(),
            "weight": st.integers(1, 10_000),
            "seed": st.integers(0, 2**31),
        }
    )
    return draw(st.lists(node, min_size=1, max_size=4))


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.fixture(scope="module")
def gpt2() -> torch.nn.Module:
    """GPT-2's Conv1D keeps its weight as [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    )


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cohort=cohorts())
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_aggregate_is_pefts_concatenated_merge(
    family: str, cohort: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    layout = Layout.from_model(model)
    targets = ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "up_proj"]
    wrapped = _adapted(model, targets, cohort)
    try:
        updates = [_update(wrapped, layout, f"node{i}") for i in range(len(cohort))]
        result = aggregate([(u, n["weight"]) for u, n in zip(updates, cohort, strict=True)], layout)
        found = result.dense()
        carried = Carry.empty(layout).add(result.updates["low_rank"]).dense()
        total = sum(node["weight"] for node in cohort)
        wrapped.add_weighted_adapter(
            [f"node{i}" for i in range(len(cohort))],
            [node["weight"] / total for node in cohort],
            MERGED,
            combination_type="cat",
        )
        # peft means the merged adapter to have scale 1 (alpha = rank), but lets it inherit the first
        # adapter's rsLoRA, which makes its scale sqrt(rank).
        expected = {
            f"{path}.weight": layer.get_delta_weight(MERGED).detach().double()
            / layer.scaling[MERGED]
            for path, layer in _layers(wrapped)
        }
    finally:
        wrapped.unload()
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert change.shape == layout.shape(name)
        limit = TOLERANCE * float(change.norm())
        assert float((found[name] - change).norm()) <= limit
        assert float((carried[name] - change).norm()) <= limit


def _adapted(model: torch.nn.Module, targets: list[str], cohort: list[dict[str, Any]]) -> Any:
    from peft import LoraConfig, get_peft_model

    wrapped: Any = None
    for index, node in enumerate(cohort):
        configuration = LoraConfig(
            r=node["rank"],
            lora_alpha=node["alpha"],
            use_rslora=node["rslora"],
            target_modules=targets,
            fan_in_fan_out="c_fc" in targets,
        )
        if wrapped is None:
            wrapped = get_peft_model(model, configuration, adapter_name="node0")
        else:
            wrapped.add_adapter(f"node{index}", configuration)
        generator = torch.Generator().manual_seed(node["seed"])
        for _, layer in _layers(wrapped):
            for factor in (layer.lora_A, layer.lora_B):
                weight = factor[f"node{index}"].weight
                weight.data = torch.randn(weight.shape, generator=generator)
    return wrapped


def _update(wrapped: Any, layout: Layout, adapter: str) -> LowRank:
    factors = {}
    for path, layer in _layers(wrapped):
        b, a = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
        if layer.fan_in_fan_out:
            b, a = a.T, b.T
        factors[f"{path}.weight"] = (b, a, float(layer.scaling[adapter]))
    return LowRank(layout, factors)


def _layers(wrapped: Any) -> Iterator[tuple[str, Any]]:
    for path, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            yield path, module
