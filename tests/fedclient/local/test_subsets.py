"""Which tensors are trained: shares, draws, and the best choice under a budget."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import Layout
from fedclient.data import Tokens, batches
from fedclient.local import subsets

LAYERS = 6
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")
LAYOUT = Layout(
    {"model.embed_tokens.weight": (20, 8)}
    | {f"model.layers.{n}.{part}.weight": (8, 8) for n in range(LAYERS) for part in PARTS}
    | {f"model.layers.{n}.input_layernorm.weight": (8,) for n in range(LAYERS)}
    | {"model.norm.weight": (8,), "lm_head.weight": (20, 8)}
)
NAMES = [spec.name for spec in LAYOUT]
OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
SEEDS = st.integers(0, 2**63 - 1)


def layers_of(names):
    return {int(name.split(".")[2]) for name in names if ".layers." in name}


@given(seed=SEEDS, share=st.floats(0.01, 1))
def test_owlore_trains_whole_layers_and_what_is_outside(seed, share):
    outliers = {name: 0.01 for name in NAMES}
    found = subsets.owlore(LAYOUT, NAMES, seed, share, outliers)
    assert found == sorted(found, key=LAYOUT.tensor_id)
    assert set(found) >= OUTSIDE
    assert len(layers_of(found)) == max(1, round(share * LAYERS))
    assert len(found) == len(OUTSIDE) + 6 * len(layers_of(found))
    assert subsets.owlore(LAYOUT, NAMES, seed, share, outliers) == found


def test_owlore_draws_layers_by_their_outliers():
    outliers = {name: 0.9 if ".layers.2." in name else 0.02 for name in NAMES}
    draws = [subsets.owlore(LAYOUT, NAMES, seed, 1 / 6, outliers) for seed in range(200)]
    counts = Counter(layer for names in draws for layer in layers_of(names))
    assert counts[2] == pytest.approx(200 * 0.9, abs=25)  # 0.9 / (0.9 + 5 * 0.02)
    evenly = [subsets.owlore(LAYOUT, NAMES, seed, 1 / 6, {}) for seed in range(200)]
    assert len(Counter(layer for names in evenly for layer in layers_of(names))) == LAYERS


@given(seed=SEEDS)
def test_hft_halves_every_group(seed):
    found = subsets.hft(LAYOUT, NAMES, seed)
    assert abs(2 * len(found) - len(NAMES)) <= 1
    for layer in range(LAYERS):
        for block, sizes in (("self_attn", {1}), ("mlp", {1, 2}), ("input_layernorm", {0, 1})):
            mine = [name for name in found if f"layers.{layer}.{block}" in name]
            assert len(mine) in sizes


def test_hft_gives_every_tensor_its_turn():
    counts = Counter(n for seed in range(200) for n in subsets.hft(LAYOUT, NAMES, seed))
    assert all(60 <= counts[name] <= 140 for name in NAMES)


@settings(max_examples=60)
@given(data=st.data(), share=st.floats(0.02, 0.99))
def test_green_trainer_is_the_best_choice_within_the_budget(data, share):
    """Against all subsets of a small model, with costs written out a second time."""
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=7))
    vectors = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    shapes = {
        f"layers.{n}.weight": (size,) if vector else (size, 3)
        for n, (size, vector) in enumerate(zip(sizes, vectors, strict=True))
    }
    layout = Layout(shapes)
    names = list(shapes)
    gains = {name: data.draw(st.floats(0, 10)) for name in names}
    elements = [math.prod(shapes[name]) for name in names]
    passing = [e if len(shapes[name]) > 1 else 0 for e, name in zip(elements, names, strict=True)]

    def cost(chosen):
        return sum(elements[i] for i in chosen) + sum(passing[min(chosen) + 1 :])

    everything = cost(range(len(names)))
    found = [names.index(name) for name in subsets.green_trainer(layout, names, gains, share)]
    choices = [
        c for k in range(1, len(names) + 1) for c in itertools.combinations(range(len(names)), k)
    ]
    fitting = [c for c in choices if cost(c) <= share * everything * (1 - 1e-3)]
    if cost(found) > share * everything * (1 + 1e-9):
        assert found == [len(names) - 1]
        assert not fitting
        return
    best = max((sum(gains[names[i]] for i in c) for c in fitting), default=0.0)
    assert sum(gains[names[i]] for i in found) >= best - 1e-9


def test_green_trainer_knows_that_a_tied_head_is_passed_by_all():
    """With half of the elements in the head, a share that pays for it leaves the less for others."""
    tied = Layout({"embed.weight": (64, 8)} | {f"layers.{n}.weight": (8, 8) for n in range(4)})
    names = [f"layers.{n}.weight" for n in range(4)]
    gains = dict.fromkeys(names, 1.0)
    untied = Layout({f"layers.{n}.weight": (8, 8) for n in range(4)})
    # 512 through the head, 64 a layer, and 64 through each layer above: 960 in all, against 448.
    assert subsets.green_trainer(tied, names, gains, 0.55) == names[3:]
    assert subsets.green_trainer(untied, names, gains, 0.72) == names[1:]
    assert subsets.green_trainer(untied, names, gains, 0.71) == names[2:]
    assert subsets.green_trainer(tied, names, gains, 1.0) == names


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_outliers_are_found_where_they_are(make_model, name):
    model = make_model(name)
    layout = Layout.from_model(model)
    tokens = [Tokens([(7 * n + k) % 300 for k in range(12)], 3) for n in range(4)]
    (batch,) = batches(tokens, 4, 1, 0, pad_id=0)
    before = subsets.outlier_shares(model, layout, batch)
    assert before
    assert all(0 <= share < 0.5 for share in before.values())
    chosen = next(key for key in before if key.endswith(("down_proj.weight", "c_fc.weight")))
    with torch.no_grad():
        dict(model.named_parameters())[chosen].flatten()[::20] *= 40
    after = subsets.outlier_shares(model, layout, batch)
    assert after[chosen] > before[chosen] + 0.02
    assert all(key in ("lm_head.weight",) or "." in key for key in after)
