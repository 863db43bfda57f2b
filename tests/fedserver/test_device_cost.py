"""What a plan asks of a device: less for methods that keep less, and more for slow devices and links."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregators import Basis, Layout, Sketch, encode
from aggregators.messages import Plan
from aggregators.methods import HybridMethod, SketchMethod, ZerothOrderMethod
from fedserver.configuration import NodeConfiguration, parse
from fedserver.device_cost import ENVELOPE, NAMED, device_seconds, memory_of, upload_bytes

LAYERS = 6
LAYOUT = Layout(
    {f"{i}.q_proj.weight": (512, 384) for i in range(LAYERS)}
    | {f"{i}.down_proj.weight": (384, 512) for i in range(LAYERS)}
    | {"norm.weight": (6,)}
)
FORWARD = ZerothOrderMethod(master_seed=1, pool_size=8, probe="rank1", epsilon=1e-3, clip=None)


@pytest.fixture
def plan(lora_plan: Callable[..., Plan]) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        values: dict[str, Any] = {
            "run": "r", "round": 1, "node": "a", "nonce": "0" * 16, "layout": LAYOUT.fingerprint,
            "base_model": "m", "base_digest": "0" * 64, "action": "train", "preset": "mixed",
            "seed": 1, "local_steps": 1, "batch_size": 4, "learning_rate": 0.1, "max_length": 16,
            "dtype": "float32", "wire_dtype": None, "threads": 1, "accelerate": False,
            "evaluate": False, "deadline_seconds": 1.0, "max_norm": None,
            "target_modules": ("all-linear",), "rank": 4, "alpha": 8.0, "rslora": False,
            "dropout": 0.0, "init": "random", "train_a": True, "start": "fresh", "sends": "factors",
            "shared_seed": 1, "weight_decay": 0.0, "warmup_steps": 0,
        }  # fmt: skip
        return lora_plan(**values | changes)

    return make


def sketch(optimiser: str) -> SketchMethod:
    return SketchMethod.model_validate(
        {"target_modules": (), "master_seed": 1, "rank": 2, "oversampling": 2,
         "optimiser": optimiser, "error_feedback": False}
    )  # fmt: skip


def test_forward_passes_need_least_and_whole_weights_most(plan: Callable[..., Plan]) -> None:
    lora = plan()
    costs = [
        memory_of(lora.model_copy(update={"method": method}), LAYOUT, pool_size=8).total
        for method in (FORWARD, lora.method, sketch("sgd"), sketch("adamw"))
    ]
    weights = 4 * LAYOUT.elements
    assert costs == sorted(costs)
    assert 2 * weights < costs[0] < 2.3 * weights
    assert costs[3] - costs[2] == 2 * weights


def test_a_hybrid_node_keeps_less_the_higher_it_cuts(plan: Callable[..., Plan]) -> None:
    layout = Layout({f"layers.{n}.q_proj.weight": (512, 64) for n in range(4)})
    lora = plan()

    def bytes_of(cut: int) -> int:
        method = HybridMethod(
            lower=FORWARD.model_copy(update={"layers": (0, cut)}),
            upper=lora.lora.model_copy(update={"layers": (cut, 4)}),
            upper_learning_rate=1e-3,
        )
        return memory_of(lora.model_copy(update={"method": method}), layout, pool_size=8).total

    costs = [bytes_of(cut) for cut in (3, 2, 1)]
    assert (
        4 * layout.elements
        < costs[0]
        < costs[1]
        < costs[2]
        < memory_of(lora, layout, pool_size=8).total
    )


def test_what_grows_with_rank_batch_and_type(plan: Callable[..., Plan]) -> None:
    usual = memory_of(plan(), LAYOUT).total
    assert memory_of(plan(rank=8), LAYOUT).total > usual
    assert memory_of(plan(batch_size=8), LAYOUT).total > usual
    assert usual - memory_of(plan(dtype="bfloat16"), LAYOUT).total == 2 * LAYOUT.elements


def test_fewer_bits_take_less_and_need_no_copy(plan: Callable[..., Plan]) -> None:
    forward = plan().model_copy(update={"method": FORWARD})
    formats = ("full", "int8", "nf4")
    costs = [
        memory_of(forward.model_copy(update={"base_format": name}), LAYOUT, pool_size=8)
        for name in formats
    ]
    assert costs[0].base > costs[1].base > costs[2].base > LAYOUT.elements // 2
    assert costs[0].view == costs[0].base
    assert costs[1].view == costs[2].view < costs[0].base / 100


def test_what_a_reply_takes(plan: Callable[..., Plan]) -> None:
    sent = [upload_bytes(plan(rank=rank, wire_dtype="bfloat16"), LAYOUT) for rank in (4, 8)]
    assert sent[1] - sent[0] == 4 * 2 * LAYERS * 2 * (512 + 384)
    forward = plan(local_steps=200, wire_dtype="int8").model_copy(update={"method": FORWARD})
    assert upload_bytes(forward, LAYOUT) < 2500


@given(
    shapes=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3),
    rank=st.integers(1, 6),
    oversampling=st.integers(0, 6),
    wide=st.booleans(),
)
@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_sketch_takes_what_is_said_in_the_first_round_and_later(
    plan: Callable[..., Plan],
    shapes: list[tuple[int, int]],
    rank: int,
    oversampling: int,
    wide: bool,
) -> None:
    layout = Layout({f"{place}.weight": shape for place, shape in enumerate(shapes)})
    names = [spec.name for spec in layout]
    basis = Basis.random(layout, names, 1, rank, oversampling, wide=wide)
    sent = Sketch.of(layout, basis, {spec.name: torch.ones(spec.shape) for spec in layout})
    method = sketch("sgd").model_copy(update={"rank": rank, "oversampling": oversampling})
    asked = plan(round=1 if wide else 2).model_copy(update={"method": method})
    size = len(encode(sent, "float32"))
    said = upload_bytes(asked.model_copy(update={"wire_dtype": "float32"}), layout)
    assert size <= said <= size + ENVELOPE + NAMED * len(shapes)


def test_a_slow_device_on_a_slow_link() -> None:
    node = NodeConfiguration(name="phone", speed=0.1, link_mbps=8.0)
    assert device_seconds(node, 3.0, 2_000_000) == pytest.approx(30.0 + 2.0)
    assert device_seconds(NodeConfiguration(name="here"), 3.0, 2_000_000) == 3.0
    assert device_seconds(None, 3.0, 2_000_000) == 3.0


def test_what_a_device_is_like_changes_no_number_of_a_run() -> None:
    plain = parse({"nodes": [{"name": "a"}]})
    slow = parse({"nodes": [{"name": "a", "speed": 0.2, "link_mbps": 1.0}]})
    assert plain.run_id() == slow.run_id()
    assert plain.run_id() != parse({"nodes": [{"name": "a", "lora_r": 3}]}).run_id()
