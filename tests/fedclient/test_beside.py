"""A view beside a quantised base is the dense view on the dequantised one, and leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import fedkernels as fk
from aggregators import Dense, Layout, LowRank, SeedScalars
from aggregators.methods import ZerothOrderMethod
from aggregators.probe_sum import ProbeSum
from aggregators.view import View
from fedclient import quantised_base
from fedclient.base_model import LoadedModel
from fedclient.beside import UnseenChangeError, standing, standing_on
from fedclient.local import zeroth_order
from fedclient.local.perturbation import perturbable
from fedclient.local.placement import place
from fedclient.loss import answer_loss

FORMATS = ("nf4", "int4", "int8")
POOL = 64


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path) -> str:
    return str(tiny_model_folder)


def base_in(folder: str, base_format: Any) -> LoadedModel:
    return quantised_base.load(folder, "float32", base_format)


def view_of(layout: Layout, seed: int, used: int, rank: int, size: float = 3e-3) -> View:
    chance = torch.Generator().manual_seed(seed)
    indices = sorted(torch.randperm(POOL, generator=chance)[:used].tolist())
    amounts = torch.randn(used, generator=chance, dtype=torch.float64) * size
    pool = ProbeSum.pool(layout, 7, POOL, "rank1", -30)
    if used:
        pool = pool.add(SeedScalars(layout, 7, POOL, indices, amounts, "rank1"))
    factors = {
        spec.name: (
            torch.randn(spec.shape[0], rank, generator=chance),
            torch.randn(rank, spec.shape[1], generator=chance),
            size,
        )
        for spec in layout
        if rank and len(spec.shape) == 2
    }
    norms = [spec for spec in layout if len(spec.shape) == 1][:2]
    whole = {s.name: 0.1 * torch.randn(s.shape, generator=chance) for s in norms}
    return View(LowRank(layout, factors) if factors else None, (pool,), Dense(layout, whole))


def oracle(base: LoadedModel, whole: nn.Module, view: View) -> nn.Module:
    """A model in float64 whose weights are the dequantised ones and the view's dense change."""
    model = copy.deepcopy(whole).double()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for tensor in place(base.model, base.layout):
            name, weight = tensor.spec.name, tensor.weight
            held = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
            change = torch.zeros(tensor.spec.shape, dtype=torch.float64)
            for part in (view.adapter, view.whole, *view.sums):
                change += 0 if part is None else part.dense().get(name, 0)
            parameters[name].copy_(held.double() + change)
    return model


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 260, (3, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(
    base_format=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**20),
    used=st.sampled_from([0, 1, 31, 33, POOL]),
    rank=st.integers(0, 3),
)
def test_logits_are_those_of_the_dense_change(
    folder: str, base_format: str, seed: int, used: int, rank: int
) -> None:
    base, whole = base_in(folder, base_format), base_in(folder, "full").model
    view, batch = view_of(base.layout, seed, used, rank), batch_of(seed)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    exact = oracle(base, whole, view)
    with torch.no_grad():
        wanted = exact(**inputs).logits
        untouched = base.model(**inputs).logits
        with standing_on(base.model, base.layout, standing(base, view)):
            found = base.model(**inputs).logits.double()
            loss = float(answer_loss(base.model, batch)[0])
            with perturbable(base.model, base.layout, "rank1") as asked:
                (said,) = asked.predictions(batch, [(5, 0.0)])
        assert torch.equal(base.model(**inputs).logits, untouched)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    labels = batch["labels"][:, 1:].flatten()
    exact_loss = float(
        nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), labels, reduction="sum")
    )
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    assert float(said.loss) == pytest.approx(exact_loss / labels.numel(), rel=1e-5)


def test_a_base_in_half_precision(folder: str) -> None:
    base = quantised_base.load(folder, "bfloat16", "nf4")
    whole = base_in(folder, "full").model
    view, batch = view_of(base.layout, 9, 33, 1), batch_of(2)
    wanted = oracle(base, whole, view)(batch["input_ids"]).logits
    made = standing(base, view)
    with torch.no_grad(), standing_on(base.model, base.layout, made):
        found = base.model(batch["input_ids"]).logits.double()
    assert float((found - wanted).norm() / wanted.norm()) < 3e-2
    assert made.digest != standing(base_in(folder, "nf4"), view).digest


def test_gradients_pass_through_what_stands_beside(folder: str) -> None:
    """The loss's gradient at the embedding's output, against the dense oracle's."""
    base, whole = base_in(folder, "nf4"), base_in(folder, "full").model
    view, batch = view_of(base.layout, 3, 40, 2), batch_of(8)
    exact = oracle(base, whole, view)

    def gradient(model: Any) -> torch.Tensor:
        rows: list[torch.Tensor] = []

        def keep(module: nn.Module, inputs: Any, y: torch.Tensor) -> torch.Tensor:
            rows.append(y.detach().requires_grad_(True))
            return rows[-1]

        handle = model.get_input_embeddings().register_forward_hook(keep)
        try:
            answer_loss(model, batch)[0].backward()  # type: ignore[no-untyped-call]
        finally:
            handle.remove()
        assert rows[0].grad is not None
        return rows[0].grad.double()

    wanted = gradient(exact)
    with standing_on(base.model, base.layout, standing(base, view)):
        found = gradient(base.model)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("base_format", FORMATS)
def test_a_format_and_a_view_have_one_digest(folder: str, base_format: Any) -> None:
    base = base_in(folder, base_format)
    views = [view_of(base.layout, seed, 33, 1) for seed in (1, 2)]
    digests = [standing(base, view).digest for view in views * 2]
    assert digests[:2] == digests[2:]
    others = {base_in(folder, other).content for other in FORMATS}
    assert len({*digests[:2], base.digest, base.content}) == 4
    assert len(others) == 3


def test_a_walk_on_a_quantised_base_leaves_the_base_as_it_was(folder: str) -> None:
    base = base_in(folder, "nf4")
    before = quantised_base.content_digest(base.model)
    view = view_of(base.layout, 5, 20, 1)
    method = ZerothOrderMethod(
        master_seed=7, pool_size=POOL, probe="rank1", epsilon=1e-3, clip=None
    )
    stream = [batch_of(seed) for seed in range(12)]
    with standing_on(base.model, base.layout, standing(base, view)):
        update, result = zeroth_order.train(
            base.model, base.layout, stream, method, seed=4, learning_rate=1e-3, steps=12
        )
    assert len(update.indices) > 5
    assert result.steps == 12
    assert quantised_base.content_digest(base.model) == before
    assert not any(module._forward_hooks for module in base.model.modules())


def test_dense_probes_cannot_stand_beside_a_quantised_weight(folder: str) -> None:
    base = base_in(folder, "nf4")
    one = ProbeSum.pool(base.layout, 7, POOL, "rademacher", -30)
    one = one.add(SeedScalars(base.layout, 7, POOL, [1], [0.1], "rademacher"))
    with pytest.raises(UnseenChangeError, match="rademacher"):
        standing(base, View(sums=(one,)))


def test_the_whole_base_is_shared_with_the_quantised_ones_but_not_changed(folder: str) -> None:
    whole = base_in(folder, "full")
    for base_format in FORMATS:
        base = base_in(folder, base_format)
        assert base is base_in(folder, base_format)
        assert (base.digest, base.layout) == (whole.digest, whole.layout)
        kinds = {type(module) for module in base.model.modules()}
        assert {fk.QuantizedLinear, fk.QuantizedEmbedding} <= kinds
        held = sum(
            t.nbytes for t in {t.data_ptr(): t for t in base.model.state_dict().values()}.values()
        )
        assert held < 0.35 * 4 * base.layout.elements
    assert fk.QuantizedLinear not in {type(module) for module in whole.model.modules()}
