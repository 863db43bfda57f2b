"""The loss at W + scale z is that of a model whose weights are W + scale z, and W stays W."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fedkernels as fk
from aggregators import Layout
from fedclient.local import rank1_pass
from fedclient.local.perturbation import perturbable
from fedclient.local.placement import PlacementError
from fedclient.loss import answer_loss

ARCHITECTURES = ["llama", "tied", "gemma2", "granite", "gpt2", "bert"]
PAIRED = {"llama", "tied", "granite", "gpt2"}
PROBES = ["rank1", "rademacher", "gaussian"]
POINTS = [(5, 1e-2), (5, -1e-2), (7, 0.0), (9, 3e-2)]
FIXED = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def a_batch(seed: int = 0, padded: bool = True) -> dict[str, Tensor]:
    """Two rows of 12 tokens, some without a label, the second of them padded."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(300, (2, 12), generator=chance)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[0, :5] = -100
    if padded:
        mask[1, 9:], labels[1, 9:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_of(model: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        total, labelled, _ = answer_loss(model, batch)
    return float(total.double()) / labelled


def moved(
    model: Any, layout: Layout, probe: str, terms: Sequence[tuple[int, float]], names: Any = None
) -> Any:
    """A deep copy whose weights are W + sum of scale z, built in float64 and rounded once."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if names is not None and name not in names:
                continue
            total = weight.double()
            for seed, scale in terms:
                z = fk.noise(seed, layout.tensor_id(name), weight.shape, probe)
                total = total + scale * z.double()
            weight.copy_(total)
    return other


def bits(model: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.named_parameters()}


def same_bits(model: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def is_bare(model: Any) -> bool:
    return not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_are_those_of_a_model_that_was_really_moved(
    architecture: str, probe: str, make_model: Callable[[str], Any]
) -> None:
    model = make_model(architecture)
    layout, before, batch = Layout.from_model(model), bits(model), a_batch()
    expected = [loss_of(moved(model, layout, probe, [point]), batch) for point in POINTS]
    assert max(expected) > min(expected) * (1 + 1e-3)  # the probes are seen at all
    with perturbable(model, layout, probe) as asked:
        for _ in range(3):
            found = [said.loss for said in asked.predictions(batch, POINTS)]
            assert found == pytest.approx(expected, rel=1e-5)
        assert asked.paired == (probe == "rank1" and architecture in PAIRED)
        assert same_bits(model, before)
    assert same_bits(model, before)
    assert is_bare(model)


@FIXED
@given(
    architecture=st.sampled_from(["llama", "tied", "gpt2"]),
    probe=st.sampled_from(PROBES),
    walk=st.lists(st.floats(-3e-3, 3e-3), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_after_a_walk_losses_are_those_along_it(
    make_model: Callable[[str], Any], architecture: str, probe: str, walk: list[float], seed: int
) -> None:
    """Whether steps come one by one, after a measurement of theirs or not, or several at once."""
    model = make_model(architecture)
    layout, batch = Layout.from_model(model), a_batch(seed)
    start = copy.deepcopy(model)
    terms = [(seed + k % 7, amount) for k, amount in enumerate(walk)]
    with perturbable(model, layout, probe) as asked:
        for place, (key, amount) in enumerate(terms):
            if place % 3:
                asked.predictions(batch, [(key, 1e-3), (key, -1e-3)])
            asked.move({key: amount / 2, 1000 + place: 1e-4} if place == 4 else {key: amount / 2})
            asked.move({key: amount / 2})
        if len(terms) > 4:
            terms.append((1004, 1e-4))
        found = [said.loss for said in asked.predictions(batch, POINTS)]
    for loss, point in zip(found, POINTS, strict=True):
        assert loss == pytest.approx(
            loss_of(moved(start, layout, probe, [*terms, point]), batch), rel=1e-5
        )
    expected = moved(start, layout, probe, terms)
    for (name, weight), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, want, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("embedding", [False, True])
def test_beside_a_quantised_base_the_walk_is_kept_as_terms(
    probe: str, embedding: bool, make_model: Callable[[str], Any]
) -> None:
    model = make_model("tied")
    layout, batch = Layout.from_model(model), a_batch()
    fk.quantize_linears(model, "nf4")
    if embedding:
        fk.quantize_embeddings(model)
    plain = make_model("tied")  # of the quantised values
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            path, _, _ = name.rpartition(".")
            module = model.get_submodule(path)
            if type(module) is fk.QuantizedEmbedding:
                weight.copy_(model.lm_head.quantized.dequantize())
            else:
                weight.copy_(module.weight)
    start = copy.deepcopy(plain)
    terms = [(40 + k, 1e-3 * (-1) ** k) for k in range(rank1_pass.PENDING + 3)]
    with perturbable(model, layout, probe) as asked:
        for seed, amount in terms:
            asked.predictions(batch, [(seed, 1e-2), (seed, -1e-2)])
            asked.move({seed: amount})
        found = [said.loss for said in asked.predictions(batch, POINTS)]
        assert asked.paired == (probe == "rank1")
    for loss, point in zip(found, POINTS, strict=True):
        expected = loss_of(moved(start, layout, probe, [*terms, point]), batch)
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("probe", ["rank1", "rademacher"])
def test_bfloat16_weights_lose_no_small_step(probe: str, make_model: Callable[[str], Any]) -> None:
    """A thousand steps of 1e-5 move the loss as one step of 1e-2 does, and no weight holds them."""
    model = make_model("llama").to(torch.bfloat16)
    layout, before, batch = Layout.from_model(model), bits(model), a_batch()
    with perturbable(model, layout, probe) as asked:
        (at_once,) = asked.predictions(batch, [(3, 3e-2)])
        (base,) = asked.predictions(batch, [(3, 0.0)])
        for _ in range(1000):
            asked.move({3: 3e-5})
        (step_by_step,) = asked.predictions(batch, [(3, 0.0)])
    assert abs(at_once.loss - base.loss) > 0.05
    assert step_by_step.loss == pytest.approx(at_once.loss, abs=0.2 * abs(at_once.loss - base.loss))
    matrices = {name: old for name, old in before.items() if old.ndim == 2}
    assert all(torch.equal(dict(model.named_parameters())[n], old) for n, old in matrices.items())


@pytest.mark.parametrize("probe", ["rank1", "rademacher"])
def test_only_the_named_tensors_are_moved(probe: str, make_model: Callable[[str], Any]) -> None:
    model = make_model("llama")
    layout, batch = Layout.from_model(model), a_batch()
    names = [spec.name for spec in layout if "q_proj" in spec.name or "lm_head" in spec.name]
    expected = [loss_of(moved(model, layout, probe, [point], names), batch) for point in POINTS]
    before = bits(model)
    with perturbable(model, layout, probe, names) as asked:
        found = [said.loss for said in asked.predictions(batch, POINTS)]
        asked.move({1: 1e-3})
    assert found == pytest.approx(expected, rel=1e-5)
    changed = {n for n, weight in model.named_parameters() if not torch.equal(weight, before[n])}
    assert changed == set(names)


@pytest.mark.parametrize("probe", PROBES)
def test_predictions_are_those_of_the_moved_model(
    probe: str, make_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the vocabulary comes in blocks whose last is short."""
    monkeypatch.setattr("fedclient.local.vocabulary.BLOCK", 64)
    monkeypatch.setattr("fedclient.local.rank1_pass.BLOCK", 64)
    model, batch = make_model("tied"), a_batch()
    layout = Layout.from_model(model)
    with perturbable(model, layout, probe) as asked:
        (found,) = asked.predictions(batch, [(5, 1e-2)])
    other = moved(model, layout, probe, [(5, 1e-2)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    targets = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = other(**inputs).logits[:, :-1][targets != -100]
    assert torch.equal(found.best, logits.argmax(1))
    assert torch.equal(found.labels, targets[targets != -100])
    assert torch.equal(found.examples, (targets != -100).nonzero()[:, 0])
    wanted = torch.nn.functional.cross_entropy(logits, found.labels, reduction="none")
    torch.testing.assert_close(found.losses, wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("probe", ["rank1", "rademacher"])
def test_an_error_inside_leaves_the_model_as_it_was(
    probe: str, make_model: Callable[[str], Any]
) -> None:
    model = make_model("llama").train()
    layout, before, batch = Layout.from_model(model), bits(model), a_batch()
    broken = {**batch, "input_ids": batch["input_ids"] + 10_000}
    with pytest.raises(IndexError), perturbable(model, layout, probe) as asked:
        asked.predictions(broken, POINTS)
    assert same_bits(model, before)
    assert is_bare(model)
    assert model.training
    assert all(module.training for module in model.modules())


def test_an_accelerated_model_stays_accelerated(make_model: Callable[[str], Any]) -> None:
    model = make_model("llama")
    fk.accelerate(model)
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    with perturbable(model, Layout.from_model(model), "rank1") as asked:
        asked.predictions(a_batch(), POINTS)
    assert {module: module.__dict__.get("forward") for module in model.modules()} == before


def test_a_batch_without_labels_says_nothing(make_model: Callable[[str], Any]) -> None:
    model = make_model("tied")
    batch = a_batch()
    batch["labels"].fill_(-100)
    for probe in PROBES:
        with perturbable(model, Layout.from_model(model), probe) as asked:
            found = asked.predictions(batch, POINTS)
        assert [said.loss for said in found] == [0.0] * len(POINTS)


def test_a_layout_of_another_model_is_refused(make_model: Callable[[str], Any]) -> None:
    model = make_model("llama")
    for shapes in ({"nowhere.weight": (3, 3)}, {"lm_head.weight": (300, 31)}):
        with (
            pytest.raises(PlacementError, match=next(iter(shapes))),
            perturbable(model, Layout(shapes), "rank1"),
        ):
            pass
    assert is_bare(model)
