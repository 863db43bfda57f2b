"""First-order training of the weights themselves: what changes, and in what precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import Layout
from aggregators.methods import FirstOrderMethod, ProjectedMethod, SketchMethod
from fedclient.data import Tokens, batches
from fedclient.local import first_order
from fedclient.local.low_rank_adamw import LowRankAdamW, leading_directions
from fedclient.loss import answer_loss


def some_batches(steps=4, seed=1):
    tokens = [Tokens([(5 * n + 3 * k) % 300 for k in range(9)], 4) for n in range(6)]
    return batches(tokens, 3, steps, seed, pad_id=0)


def method(**changes) -> FirstOrderMethod:
    standard: dict[str, Any] = {
        "target_modules": (), "master_seed": 3, "optimiser": "sgd", "error_feedback": False,
    }  # fmt: skip
    return FirstOrderMethod(**standard | changes)


def weights(model):
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def train(model, asked, steps=4, rate=0.05, **others):
    layout = Layout.from_model(model)
    return first_order.train(
        model, layout, some_batches(steps), asked,
        seed=7, learning_rate=rate, steps=steps, **others,
    )  # fmt: skip


def loss(model):
    with torch.no_grad():
        sums = [answer_loss(model, batch)[:2] for batch in some_batches(2)]
    return sum(float(total) for total, _ in sums) / sum(count for _, count in sums)


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_the_change_is_after_minus_before_and_one_sgd_step_is_the_gradient(make_model, name):
    model = make_model(name)
    before = weights(model)
    change, result = train(model, method(), steps=1)
    assert change.keys() == before.keys()  # tied weights once, by the layout's names
    for key, after in weights(model).items():
        torch.testing.assert_close(before[key] + change[key], after, rtol=1e-6, atol=1e-7)
    reference = make_model(name)
    reference.load_state_dict({k: v.float() for k, v in before.items()}, strict=False)
    reference.requires_grad_(True)
    total, labelled, _ = answer_loss(reference, next(iter(some_batches(1))))
    (total / labelled).backward()
    for key, parameter in reference.named_parameters():
        torch.testing.assert_close(change[key], -0.05 * parameter.grad, rtol=1e-4, atol=1e-7)
    assert (result.steps, result.tokens) == (1, labelled)
    assert result.first_loss == pytest.approx(float(total.detach()) / labelled, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimiser": "adamw"}, {"optimiser": "adamw", "gradient_rank": 4}, {"subset": "hft"},
     {"subset": "owlore"}, {"subset": "green-trainer"},
     {"subset": "owlore", "optimiser": "adamw", "gradient_rank": 4}],
)  # fmt: skip
def test_training_lowers_the_loss_and_leaves_the_rest(make_model, changes):
    model = make_model("llama")
    before, start = weights(model), loss(model)
    seen = []
    change, result = train(
        model, method(**changes), steps=12, rate=0.002 if "optimiser" in changes else 0.02,
        progress=lambda *event: seen.append(event),
    )  # fmt: skip
    assert loss(model) < start
    assert [event[:2] for event in seen] == [(n + 1, 12) for n in range(12)]
    assert seen[-1][2] == result.last_loss
    for key, after in weights(model).items():
        if key in change:
            assert not torch.equal(after, before[key]), key
        else:
            assert torch.equal(after, before[key]), key
    assert (len(change) < len(before)) == ("subset" in changes)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_targets_limit_what_is_trained(make_model):
    model = make_model("llama")
    change, _ = train(model, method(target_modules=("q_proj", "layers.1.mlp.up_proj")))
    assert sorted(change) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]
    with pytest.raises(first_order.TrainingError, match="nothing_such"):
        train(model, method(target_modules=("nothing_such",)))


def test_the_same_seed_is_the_same_change(make_model):
    model = make_model("llama")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    asked = method(subset="owlore", optimiser="adamw", gradient_rank=3)
    one, _ = train(model, asked)
    model.load_state_dict(state)
    two, _ = train(model, asked)
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


def test_short_types_do_not_lose_small_steps(make_model):
    """Ten steps far below half a unit of bfloat16 add up, in the change that is sent."""
    model = make_model("llama").to(torch.bfloat16)
    exact = make_model("llama")
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    found, _ = train(model, method(), steps=10, rate=1e-5)
    expected, _ = train(exact, method(), steps=10, rate=1e-5)
    key = "model.layers.0.mlp.up_proj.weight"
    assert found[key].dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(
        found[key].flatten(), expected[key].flatten(), dim=0
    )
    assert float(cosine) > 0.98
    assert float(found[key].norm() / expected[key].norm()) == pytest.approx(1, abs=0.1)


def test_a_loss_that_is_not_finite_is_told(make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(first_order.TrainingError, match="step 1"):
        train(model, method())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(first_order.TrainingError, match="no batch"):
        train(model, method(), steps=0)


@settings(max_examples=20)
@given(rows=st.integers(6, 24), columns=st.integers(6, 24), seed=st.integers(0, 2**20))
def test_leading_directions_are_those_of_the_svd(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, 6, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, 6, generator=generator)).Q
    matrix = (u * torch.tensor([5.0, 4.0, 3.0, 0.1, 0.05, 0.01])) @ v.T
    found = leading_directions(matrix, 3, seed, 0)
    torch.testing.assert_close(found.T @ found, torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(found @ (found.T @ u[:, :3]), u[:, :3], rtol=0, atol=1e-3)


def test_the_moments_of_matrices_are_of_the_low_rank():
    wide, tall, vector = (torch.zeros(s, requires_grad=True) for s in ((12, 30), (30, 12), (9,)))
    optimiser = LowRankAdamW([wide, tall, vector], learning_rate=0.1, rank=3, seed=1)
    for _ in range(2):
        for leaf in (wide, tall, vector):
            leaf.grad = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(2))
        optimiser.step()
    shapes = [tuple(optimiser.state[leaf]["moments"].first.shape) for leaf in (wide, tall, vector)]
    assert shapes == [(3, 30), (30, 3), (9,)]
    for leaf in (wide, tall):
        assert int(torch.linalg.matrix_rank(leaf.detach())) == 3
        assert float((leaf.detach() * leaf.grad).sum()) < 0  # downhill


def test_where_nothing_is_projected_it_is_adam():
    generator = torch.Generator().manual_seed(3)
    one = torch.randn(4, 4, generator=generator).requires_grad_(True)
    two = one.detach().clone().requires_grad_(True)
    pair = (
        LowRankAdamW([one], learning_rate=0.01, rank=4, seed=0),
        torch.optim.AdamW([two], lr=0.01, weight_decay=0.0),
    )
    for _ in range(5):
        gradient = torch.randn(4, 4, generator=generator)
        one.grad, two.grad = gradient.clone(), gradient.clone()
        for optimiser in pair:
            optimiser.step()
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_methods_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="gradient_rank"):
        method(gradient_rank=4)
    common = {"target_modules": (), "master_seed": 1, "optimiser": "sgd", "error_feedback": True}
    with pytest.raises(ValueError, match="mmse"):
        ProjectedMethod(**common, probe="rademacher", coordinates={}, scale="unbiased")
    SketchMethod(**common, rank=4, oversampling=4)
