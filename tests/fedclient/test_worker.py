"""A node behind the transport: bytes in, bytes out, the same bytes for the same work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aggregators import GateContext, Layout, LowRank, admit, match_targets
from aggregators.messages import Plan, encode_plan
from aggregators.presets import PRESETS
from aggregators.view import View
from fedclient import base_model
from fedclient.base_model import LoadedModel
from fedclient.data import DataError
from fedclient.node import NodeSettings
from fedclient.worker import NodeError, Worker


@pytest.fixture
def layout(tiny: LoadedModel) -> Layout:
    return Layout.from_model(tiny.model)


def a_view(layout: Layout, plan: Plan) -> LowRank:
    chance = torch.Generator().manual_seed(8)
    factors = {}
    for name in match_targets(layout, plan.lora.target_modules):
        rows, columns = layout.shape(name)
        b = torch.randn(rows, 3, generator=chance) * 0.1
        factors[name] = (b, torch.randn(3, columns, generator=chance) * 0.1, 1.0)
    return LowRank(layout, factors)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("with_view", [False, True])
@pytest.mark.parametrize("wire_dtype", [None, "int8"])
def test_every_preset_trains_and_passes_the_gate(
    preset: str,
    with_view: bool,
    wire_dtype: str | None,
    make_plan: Callable[..., Plan],
    layout: Layout,
) -> None:
    plan = make_plan(preset, wire_dtype=wire_dtype, evaluate=True)
    view = a_view(layout, plan) if with_view else None
    payload = encode_plan(plan, View(view), "float32")
    admitted = admit(Worker().work(payload, NodeSettings(index=0)), GateContext(layout, plan))
    update, report = admitted.update, admitted.report
    assert isinstance(update, LowRank)
    assert list(update.factors) == match_targets(layout, plan.lora.target_modules)
    expected_rank = plan.lora.rank * (2 if plan.lora.sends == "delta" else 1)
    assert set(update.ranks.values()) == {expected_rank}
    assert update.squared_norm() > 0
    assert report.steps == plan.local_steps
    assert report.train_tokens > 0
    assert report.train_loss is not None
    assert report.evaluation is not None
    assert report.evaluation.examples == 4
    assert 0 < report.evaluation.correct + 1 <= report.evaluation.tokens + 1


@pytest.mark.parametrize("init", ["random", "shared", "carry", "gaussian", "orthogonal"])
@pytest.mark.parametrize("start", ["fresh", "view"])
@pytest.mark.parametrize("sends", ["factors", "delta"])
def test_every_start_init_and_message(
    init: str, start: str, sends: str, make_plan: Callable[..., Plan], layout: Layout
) -> None:
    plan = make_plan(init=init, start=start, sends=sends, local_steps=1)
    for view in (None, a_view(layout, plan)):
        reply = Worker().work(encode_plan(plan, View(view), "float32"), NodeSettings(index=0))
        assert isinstance(admit(reply, GateContext(layout, plan)).update, LowRank)


@pytest.mark.parametrize("preset", ["braid", "flexlora"])
def test_equal_work_gives_equal_bytes(
    preset: str, make_plan: Callable[..., Plan], layout: Layout
) -> None:
    plan = make_plan(preset, dropout=0.1, evaluate=True)
    payload = encode_plan(plan, View(a_view(layout, plan)), "bfloat16")
    torch.manual_seed(1)
    first = Worker().work(payload, NodeSettings(index=0))
    torch.manual_seed(2)
    other = make_plan("ffa-lora", node="two", seed=77)
    Worker().work(encode_plan(other, View(), None), NodeSettings(index=1))
    state = torch.get_rng_state()
    assert Worker().work(payload, NodeSettings(index=0)) == first
    assert torch.equal(torch.get_rng_state(), state)
    another = plan.model_copy(update={"seed": plan.seed + 1})
    assert Worker().work(
        encode_plan(another, View(a_view(layout, plan)), "bfloat16"), NodeSettings(index=0)
    ) != (first)


def test_an_evaluation_sends_no_update(make_plan: Callable[..., Plan], layout: Layout) -> None:
    plan = make_plan(action="evaluate")
    found = {}
    for name, view in (("base", None), ("view", a_view(layout, plan))):
        reply = Worker().work(encode_plan(plan, View(view), "float32"), NodeSettings(index=0))
        admitted = admit(reply, GateContext(layout, plan))
        assert admitted.update is None
        assert admitted.report.steps == 0
        assert admitted.report.evaluation is not None
        found[name] = admitted.report.evaluation
    assert found["base"].tokens == found["view"].tokens
    assert found["base"].loss_sum != found["view"].loss_sum


def test_an_evaluation_sees_the_whole_view(make_plan: Callable[..., Plan], layout: Layout) -> None:
    """Also where training would start from the part of it that the node's rank can hold."""
    scores = []
    for preset, rank in (("braid", 4), ("fedit", 1)):
        plan = make_plan(preset, action="evaluate", rank=rank)
        reply = Worker().work(
            encode_plan(plan, View(a_view(layout, plan)), "float32"), NodeSettings(index=0)
        )
        scores.append(admit(reply, GateContext(layout, plan)).report.evaluation)
    assert scores[0] is not None
    assert scores[1] is not None
    assert scores[0].loss_sum == pytest.approx(scores[1].loss_sum, rel=1e-6)


def test_another_base_is_refused(make_plan: Callable[..., Plan], tiny: LoadedModel) -> None:
    plan = make_plan(base_digest="f" * 64)
    with pytest.raises(NodeError, match=tiny.digest[:12]) as caught:
        Worker().work(encode_plan(plan, View(), None), NodeSettings(index=0))
    assert "f" * 12 in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_layout_is_refused(make_plan: Callable[..., Plan]) -> None:
    with pytest.raises(NodeError, match="layout"):
        Worker().work(encode_plan(make_plan(layout="e" * 64), View(), None), NodeSettings(index=0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init": "orthogonal", "rank": 3}, "even rank"),
        ({"target_modules": ("embed_tokens",)}, "Embedding"),
        ({"data": None}, "no data"),
        ({"data": {"sauce": "x"}}, r"data\.sauce"),
        ({"data": {"nodes": 0}}, r"data\.nodes"),
    ],
)
def test_an_impossible_plan_is_refused_in_one_line(
    changes: dict[str, Any], said: str, make_plan: Callable[..., Plan], tiny: LoadedModel
) -> None:
    with pytest.raises(NodeError, match=said) as caught:
        Worker().work(encode_plan(make_plan(**changes), View(), None), NodeSettings(index=0))
    assert "\n" not in str(caught.value)
    assert base_model.digest(tiny.model) == tiny.digest


def test_a_node_with_a_file_of_its_own(
    make_plan: Callable[..., Plan], layout: Layout, tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    rows = [f'{{"question": "number {n}?", "answer": "yes"}}' for n in range(20)]
    path.write_text("\n".join(rows))
    plan = make_plan(data={"source": "chatterbot", "nodes": 5, "key": "x", "held_out": 0.3})
    reply = Worker().work(encode_plan(plan, View(), None), NodeSettings(index=9, data=str(path)))
    report = admit(reply, GateContext(layout, plan)).report
    assert 8 <= report.examples < 20
    path.write_text('{"question": 1}')
    with pytest.raises(DataError, match=r"other\.jsonl"):
        Worker().work(
            encode_plan(plan, View(), None), NodeSettings(data=str(tmp_path / "other.jsonl"))
        )


def test_the_plan_decides_the_threads(make_plan: Callable[..., Plan]) -> None:
    seen: list[int] = []
    worker = Worker(progress=lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    for threads in (1, 2):
        worker.work(
            encode_plan(make_plan(threads=threads, local_steps=1), View(), None),
            NodeSettings(index=0),
        )
    assert seen == [1, 2]
    assert torch.get_num_threads() == before


def test_progress_is_heard(make_plan: Callable[..., Plan]) -> None:
    heard: list[tuple[str, int, int, float]] = []
    Worker(progress=lambda *report: heard.append(report)).work(
        encode_plan(make_plan(local_steps=3), View(), None), NodeSettings(index=0)
    )
    assert [report[:3] for report in heard] == [("one", step, 3) for step in (1, 2, 3)]


def test_capabilities(make_plan: Callable[..., Plan], tiny: LoadedModel, layout: Layout) -> None:
    plan = make_plan()
    query = {
        "base_model": plan.base_model,
        "dtype": plan.dtype,
        "threads": 1,
        "data": plan.data,
        "names": ["first", "second"],
    }
    found = Worker().capabilities(query, NodeSettings(index=1, rank_limit=3))
    assert (found.node, found.rank_limit, found.base_digest) == ("second", 3, tiny.digest)
    assert Layout.from_json(found.layout_json) == layout
    assert 0 < found.held_out <= 4
    assert found.examples + found.held_out <= 60
    assert found.threads == os.cpu_count()
    assert found.memory_bytes > 0
    assert type(found).from_bytes(found.to_bytes()) == found
    named = Worker().capabilities({**query, "names": []}, NodeSettings(index=1))
    assert named.node == "node-1"
    named = Worker().capabilities(query, NodeSettings(index=0, name="mine"))
    assert named.node == "mine"


def test_the_embedded_model_learns(
    default_model_folder: Path, lora_plan: Callable[..., Plan]
) -> None:
    """A few steps on one topic: the loss on what it has not seen falls."""
    base = base_model.load(str(default_model_folder))
    layout = Layout.from_model(base.model)
    plan = lora_plan(
        **{
            "run": "r" * 16,
            "round": 1,
            "node": "one",
            "nonce": "0" * 32,
            "layout": layout.fingerprint,
            "base_model": str(default_model_folder),
            "base_digest": base.digest,
            "family": "low_rank",
            "action": "train",
            "preset": "braid",
            "rank": 8,
            "alpha": 16.0,
            "rslora": False,
            "dropout": 0.0,
            "target_modules": ("q_proj", "v_proj"),
            "init": "random",
            "train_a": True,
            "start": "fresh",
            "sends": "factors",
            "seed": 1,
            "shared_seed": 1,
            "local_steps": 5,
            "batch_size": 8,
            "learning_rate": 2e-3,
            "weight_decay": 0.0,
            "warmup_steps": 1,
            "max_length": 48,
            "dtype": "float32",
            "wire_dtype": None,
            "threads": 1,
            "evaluate": False,
            "deadline_seconds": 60.0,
            "max_norm": None,
            "accelerate": True,
            "data": {
                "partition": "categories",
                "categories": [["greetings"]],
                "held_out": 0.3,
                "held_out_max": 16,
            },
        }
    )
    reply = Worker().work(encode_plan(plan, View(), None), NodeSettings(index=0))
    update = admit(reply, GateContext(layout, plan)).update
    assert isinstance(update, LowRank)
    asked = plan.model_copy(update={"action": "evaluate"})
    losses = []
    for view in (None, update):
        reply = Worker().work(encode_plan(asked, View(view), "float32"), NodeSettings(index=0))
        score = admit(reply, GateContext(layout, asked)).report.evaluation
        assert score is not None
        losses.append(score.loss_sum / score.tokens)
    assert losses[1] < 0.9 * losses[0]
    assert base_model.digest(base.model) == base.digest
