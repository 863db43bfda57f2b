"""Local LoRA: the base is left as it was, and the factors are what peft computes with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aggregators import Layout, LowRank, match_targets
from aggregators.messages import Plan
from aggregators.shared_factors import shared_a
from fedclient import base_model
from fedclient.base_model import LoadedModel
from fedclient.data import Tokens, batches
from fedclient.evaluation import evaluate
from fedclient.local import lora

LLAMA, GPT2 = "llama", "gpt2"
FIXED = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])

Factors = dict[str, tuple[Tensor, Tensor, Any]]


def some_batches(steps: int, seed: int = 1) -> Iterator[dict[str, Tensor]]:
    tokens = [Tokens([(5 * n + 3 * k) % 300 for k in range(9)], 4) for n in range(6)]
    return batches(tokens, 3, steps, seed, pad_id=0)


def random_factors(layout: Layout, names: list[str], rank: int, seed: int) -> Factors:
    """A change of a noticeable size on every named tensor; ranks differ between tensors."""
    chance = torch.Generator().manual_seed(seed)
    found: Factors = {}
    for number, name in enumerate(names):
        rows, columns = layout.shape(name)
        own = 1 + (rank + number) % rank
        b = torch.randn(rows, own, generator=chance) * 0.3
        a = torch.randn(own, columns, generator=chance) * 0.3
        found[name] = (b, a, torch.rand(own, generator=chance, dtype=torch.float64) + 0.5)
    return found


def logits(model: Any) -> Tensor:
    ids = torch.arange(24).view(2, 12) * 7 % 300
    with torch.no_grad():
        return model(input_ids=ids).logits


def structure(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("architecture", [LLAMA, GPT2])
@pytest.mark.parametrize("with_view", [False, True])
def test_the_base_is_left_as_it_was(
    architecture: str,
    with_view: bool,
    make_model: Callable[[str], Any],
    make_plan: Callable[..., Plan],
) -> None:
    model, plan = make_model(architecture), make_plan(learning_rate=0.1)
    layout = Layout.from_model(model)
    names = match_targets(layout, plan.lora.target_modules)
    view = random_factors(layout, names[1:], 3, 2) if with_view else None
    before = (base_model.digest(model), structure(model), set(vars(model)), logits(model))
    with lora.adapted(model, layout, plan, view) as wrapped:
        lora.train(wrapped, some_batches(3), plan)
        assert not torch.equal(logits(wrapped), before[3])
    after = (base_model.digest(model), structure(model), set(vars(model)), logits(model))
    assert after[:3] == before[:3]
    assert torch.equal(after[3], before[3])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert Layout.from_model(model) == layout


def test_also_after_an_error_while_training(
    make_model: Callable[[str], Any], make_plan: Callable[..., Plan]
) -> None:
    model, plan = make_model(GPT2), make_plan(dropout=0.2)
    layout = Layout.from_model(model)
    before = (base_model.digest(model), structure(model), logits(model))

    def interrupt(step: int, steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        lora.adapted(model, layout, plan, None) as wrapped,
    ):
        lora.train(wrapped, some_batches(3), plan, interrupt)
    assert (base_model.digest(model), structure(model)) == before[:2]
    assert not model.training
    assert torch.equal(logits(model), before[2])


def test_also_after_an_error_while_wrapping(
    make_model: Callable[[str], Any], make_plan: Callable[..., Plan]
) -> None:
    model, plan = make_model(LLAMA), make_plan()
    layout = Layout.from_model(model)
    before = (base_model.digest(model), structure(model), set(vars(model)))
    name = match_targets(layout, plan.lora.target_modules)[0]
    misfit = {name: (torch.ones(3, 2), torch.ones(2, 5), 1.0)}
    with pytest.raises(RuntimeError), lora.adapted(model, layout, plan, misfit):
        pass
    assert (base_model.digest(model), structure(model), set(vars(model))) == before


@FIXED
@given(
    architecture=st.sampled_from([LLAMA, GPT2, "tied"]),
    rank=st.integers(1, 40),
    alpha=st.floats(0.5, 64),
    rslora=st.booleans(),
)
def test_factors_are_pefts_delta_weights(
    make_model: Callable[[str], Any],
    make_plan: Callable[..., Plan],
    architecture: str,
    rank: int,
    alpha: float,
    rslora: bool,
) -> None:
    """In layout coordinates, which for a Conv1D are [in, out]; ranks stop at a matrix's sides."""
    model, plan = make_model(architecture), make_plan(rank=rank, alpha=alpha, rslora=rslora)
    layout = Layout.from_model(model)
    with lora.adapted(model, layout, plan, None) as wrapped:
        fill_local(wrapped)
        factors = lora.read_factors(wrapped, layout, plan)
        theirs = {
            path + ".weight": layer.get_delta_weight(lora.LOCAL).detach()
            for path, layer in wrapped.base_model.model.named_modules()
            if hasattr(layer, "get_delta_weight")
        }
    assert list(factors) == match_targets(layout, plan.lora.target_modules)
    assert factors.keys() == theirs.keys()
    for name, (b, a, scale) in factors.items():
        assert theirs[name].shape == layout.shape(name)
        assert b.shape[1] == min(rank, *layout.shape(name))
        assert scale == pytest.approx(plan.lora.scale if not rslora else scale)
        torch.testing.assert_close(scale * b @ a, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_small_matrix_keeps_the_plans_scale(
    rslora: bool, make_model: Callable[[str], Any], make_plan: Callable[..., Plan]
) -> None:
    model, plan = make_model(LLAMA), make_plan(rank=40, alpha=20.0, rslora=rslora)
    layout = Layout.from_model(model)
    with lora.adapted(model, layout, plan, None) as wrapped:
        scales = {name: f[2] for name, f in lora.read_factors(wrapped, layout, plan).items()}
    assert set(scales) == set(match_targets(layout, plan.lora.target_modules))
    for scale in scales.values():
        assert scale == pytest.approx(plan.lora.scale)


@FIXED
@given(
    architecture=st.sampled_from([LLAMA, GPT2, "tied"]),
    rank=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_view_and_local_forward_is_the_base_plus_the_dense_change(
    make_model: Callable[[str], Any],
    make_plan: Callable[..., Plan],
    architecture: str,
    rank: int,
    seed: int,
) -> None:
    model, plan = make_model(architecture), make_plan(rank=3)
    layout = Layout.from_model(model)
    names = match_targets(layout, plan.lora.target_modules)
    # Not every tensor has a part in the view, and ranks in it differ.
    view = random_factors(layout, names[seed % 3 :: 2], rank, seed)
    with lora.adapted(model, layout, plan, view) as wrapped:
        fill_local(wrapped)
        local = lora.read_factors(wrapped, layout, plan)
        found = logits(wrapped)
    assert_forward(model, found, layout, view, local)


@pytest.mark.parametrize("architecture", [LLAMA, GPT2])
@pytest.mark.parametrize("preset", ["fedit", "flexlora"])
@pytest.mark.parametrize("rank", [2, 7])
def test_a_view_that_is_trained_further_is_the_start(
    architecture: str,
    preset: str,
    rank: int,
    make_model: Callable[[str], Any],
    make_plan: Callable[..., Plan],
) -> None:
    """Its first components where the rank is lower; fresh ones, of no effect, where it is higher."""
    model, plan = make_model(architecture), make_plan(preset, rank=rank)
    layout = Layout.from_model(model)
    names = match_targets(layout, plan.lora.target_modules)
    view = random_factors(layout, names[::2], 4, 3)
    first = {name: (b[:, :rank], a[:rank], scale[:rank]) for name, (b, a, scale) in view.items()}
    with lora.adapted(model, layout, plan, view) as wrapped:
        found, local = logits(wrapped), lora.read_factors(wrapped, layout, plan)
        assert not any(f".{lora.VIEW}." in name for name, _ in wrapped.named_parameters())
    assert_forward(model, found, layout, first)
    for name, (b, a, _) in local.items():
        whole_rank = min(rank, *layout.shape(name))
        assert b.shape[1] == a.shape[0] == whole_rank
        old = first[name][0].shape[1] if name in first else 0
        fresh = shared_a(
            plan.lora.shared_seed, layout.tensor_id(name), whole_rank, layout.shape(name)[1]
        )
        assert torch.equal(a[old:], fresh[old:])
        assert not b[:, old:].any()


@pytest.mark.parametrize("init", ["random", "shared", "carry", "gaussian", "orthogonal"])
@pytest.mark.parametrize("architecture", [LLAMA, GPT2])
def test_a_fresh_adapter_changes_nothing_at_first(
    init: str,
    architecture: str,
    make_model: Callable[[str], Any],
    make_plan: Callable[..., Plan],
) -> None:
    model, plan = make_model(architecture), make_plan(init=init)
    layout = Layout.from_model(model)
    names = match_targets(layout, plan.lora.target_modules)
    view = random_factors(layout, names, 6, 4)
    with lora.adapted(model, layout, plan, view) as wrapped:
        found, local = logits(wrapped), lora.read_factors(wrapped, layout, plan)
    assert_forward(model, found, layout, view)
    for name, (b, a, _) in local.items():
        # One side is zero, or with an orthogonal start the product; a Conv1D has its sides swapped.
        assert (a != 0).any(dim=1).all() or (b != 0).any(dim=0).all(), name
        torch.testing.assert_close(b @ a, torch.zeros_like(b @ a))
        assert init in ("gaussian", "orthogonal") or not b.any()
        if init == "carry":
            own = view[name][1][: plan.lora.rank]
            torch.testing.assert_close(a[: len(own)], own)
        if init == "shared":
            assert torch.equal(
                a, shared_a(plan.lora.shared_seed, layout.tensor_id(name), 4, layout.shape(name)[1])
            )


def test_random_starts_are_the_seeds_and_the_tensors(
    make_model: Callable[[str], Any], make_plan: Callable[..., Plan]
) -> None:
    model = make_model(LLAMA)
    layout = Layout.from_model(model)

    def start(**changes: Any) -> list[Tensor]:
        torch.manual_seed(changes.pop("other", 0))
        plan = make_plan(**changes)
        with lora.adapted(model, layout, plan, None) as wrapped:
            return [a for _, a, _ in lora.read_factors(wrapped, layout, plan).values()]

    one, again, another = start(seed=1), start(seed=1, other=9), start(seed=2)
    assert all(torch.equal(x, y) for x, y in zip(one, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(one, another, strict=True))
    assert len({tuple(a.flatten().tolist()) for a in one}) == len(one)
    for a in one:  # the variance of peft's own start, Kaiming-uniform
        assert float(a.square().mean()) == pytest.approx(1 / (3 * a.shape[1]), rel=0.3)


@pytest.mark.parametrize("architecture", [LLAMA, GPT2])
def test_a_fixed_a_and_the_view_are_not_trained(
    architecture: str, make_model: Callable[[str], Any], make_plan: Callable[..., Plan]
) -> None:
    model, plan = make_model(architecture), make_plan("ffa-lora")
    layout = Layout.from_model(model)
    view = random_factors(layout, match_targets(layout, plan.lora.target_modules), 2, 5)
    with lora.adapted(model, layout, plan, view) as wrapped:
        before = lora.read_factors(wrapped, layout, plan)
        frozen = {
            name: parameter.clone()
            for name, parameter in wrapped.named_parameters()
            if f".{lora.LOCAL}." not in name
        }
        assert any(f".{lora.VIEW}." in name for name in frozen)
        lora.train(wrapped, some_batches(2), plan)
        after = lora.read_factors(wrapped, layout, plan)
        now = dict(wrapped.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in frozen.items())
    for name, (b, a, _) in after.items():
        assert torch.equal(a, before[name][1])
        assert not torch.equal(b, before[name][0])


def test_a_delta_is_the_change_since_the_start(
    make_model: Callable[[str], Any], make_plan: Callable[..., Plan]
) -> None:
    model, plan = make_model(LLAMA), make_plan("flexlora", rank=3)
    layout = Layout.from_model(model)
    view = random_factors(layout, match_targets(layout, plan.lora.target_modules), 3, 6)
    with lora.adapted(model, layout, plan, view) as wrapped:
        before = lora.read_factors(wrapped, layout, plan)
        lora.train(wrapped, some_batches(2), plan)
        after = lora.read_factors(wrapped, layout, plan)
    update = lora.local_update(before, after, layout, plan)
    start, end = LowRank(layout, before).dense(), LowRank(layout, after).dense()
    for name, change in update.dense().items():
        torch.testing.assert_close(change, end[name] - start[name])
        assert change.any()
    whole = make_plan("flexlora", rank=3, sends="factors")
    assert lora.local_update(before, after, layout, whole) == LowRank(layout, after)


def test_training_learns(make_model: Callable[[str], Any], make_plan: Callable[..., Plan]) -> None:
    model = make_model(LLAMA)
    plan = make_plan(learning_rate=0.02, local_steps=30, warmup_steps=3)
    layout = Layout.from_model(model)
    heard: list[tuple[int, int, float]] = []
    with lora.adapted(model, layout, plan, None) as wrapped:
        before = evaluate(wrapped, some_batches(1))
        result = lora.train(wrapped, some_batches(30), plan, lambda *report: heard.append(report))
        after = evaluate(wrapped, some_batches(1))
    assert after.loss_sum < 0.7 * before.loss_sum
    assert (result.steps, result.tokens) == (30, 30 * 3 * 5)
    assert [step for step, _, _ in heard] == list(range(1, 31))
    assert (heard[0][2], heard[-1][2]) == (result.first_loss, result.last_loss)


def test_rates_rise_in_the_first_steps(
    make_model: Callable[[str], Any], make_plan: Callable[..., Plan]
) -> None:
    """Adam's first step has the size of its learning rate."""
    model = make_model(LLAMA)
    layout = Layout.from_model(model)

    def first_step(warmup: int) -> float:
        plan = make_plan(learning_rate=0.01, warmup_steps=warmup)
        with lora.adapted(model, layout, plan, None) as wrapped:
            lora.train(wrapped, some_batches(1), plan)
            factors = lora.read_factors(wrapped, layout, plan)
        return max(float(b.abs().max()) for b, _, _ in factors.values())

    assert first_step(0) == pytest.approx(0.01, rel=1e-3)
    assert first_step(4) == pytest.approx(0.0025, rel=1e-3)


def test_dropout_is_the_plans_and_ends_with_training(
    make_model: Callable[[str], Any], make_plan: Callable[..., Plan]
) -> None:
    model = make_model(LLAMA)
    layout = Layout.from_model(model)
    results = {}
    for dropout in (0.0, 0.5):
        plan = make_plan(dropout=dropout, init="shared")
        torch.manual_seed(0)
        with lora.adapted(model, layout, plan, None) as wrapped:
            lora.train(wrapped, some_batches(4), plan)
            results[dropout] = lora.read_factors(wrapped, layout, plan)
            assert torch.equal(logits(wrapped), logits(wrapped))
    name = match_targets(layout, ["q_proj"])[0]
    assert not torch.equal(results[0.0][name][0], results[0.5][name][0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ("nothing",)}, "nothing"),
        ({"target_modules": ("q_proj", "embed_tokens")}, "Embedding"),
        ({"init": "orthogonal", "rank": 3}, "even rank"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    changes: Mapping[str, Any],
    said: str,
    make_model: Callable[[str], Any],
    make_plan: Callable[..., Plan],
) -> None:
    model = make_model(LLAMA)
    before = structure(model)
    plan = make_plan(**changes)
    with (
        pytest.raises(lora.AdapterError, match=said),
        lora.adapted(model, Layout.from_model(model), plan, None),
    ):
        pass
    assert structure(model) == before


def test_fifty_rounds_leave_the_base_bit_identical(
    tiny: LoadedModel, make_plan: Callable[..., Plan]
) -> None:
    model, layout = tiny.model, Layout.from_model(tiny.model)
    before = base_model.digest(model)
    assert before == tiny.digest
    view: Factors | None = None
    for round_number in range(1, 51):
        preset = ("braid", "fedit", "ffa-lora", "flexlora")[round_number % 4]
        plan = make_plan(preset, round=round_number, seed=round_number, rank=2)
        with lora.adapted(model, layout, plan, view) as wrapped:
            lora.train(wrapped, some_batches(1, round_number), plan)
            view = lora.read_factors(wrapped, layout, plan)
    assert base_model.digest(model) == before


def fill_local(wrapped: Any) -> None:
    """Give the local adapter factors of a noticeable size."""
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if f".{lora.LOCAL}." in name:
                parameter.normal_(std=0.4 / math.sqrt(max(parameter.shape)))


def assert_forward(model: Any, found: Tensor, layout: Layout, *changes: Factors) -> None:
    """``found`` are the logits of the base with the dense changes added, in float64 for reference."""
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    plain = logits(model)
    try:
        model.double()
        for factors in changes:
            for name, change in LowRank(layout, factors).dense().items():
                model.get_parameter(name).data += change
        expected = logits(model)
    finally:
        model.float()
        for name, parameter in model.named_parameters():
            parameter.data = own[name]
    assert not torch.allclose(found, plain, atol=1e-3)
    error = (found.double() - expected).norm() / expected.norm()
    assert float(error) < 1e-5
