"""A small layout, and makers of updates, plans, replies and forgeries over it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from aggregators import Layout, LowRank
from aggregators.codec import pack, unpack
from aggregators.messages import Evaluation, Plan, Report, encode_reply

QUERY, UP, DOWN = (f"model.layers.0.{part}.weight" for part in ("q_proj", "up_proj", "down_proj"))
SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    QUERY: (6, 6),
    UP: (9, 6),
    DOWN: (6, 9),
    "model.norm.weight": (6,),
    "temperature": (),
}
Change = Callable[[dict[str, Any], dict[str, Any]], None]


@pytest.fixture(scope="session")
def layout() -> Layout:
    return Layout(SHAPES)


@pytest.fixture(scope="session")
def low_rank(layout: Layout) -> Callable[..., LowRank]:
    """A maker of random low-rank changes of the three projections."""

    def make(
        seed: int = 0,
        rank: int = 2,
        scale: float | Sequence[float] = 2.0,
        dtype: torch.dtype = torch.float32,
        names: Sequence[str] = (QUERY, UP, DOWN),
    ) -> LowRank:
        generator = torch.Generator().manual_seed(seed)
        weights = torch.tensor(scale, dtype=torch.float64)
        return LowRank(
            layout,
            {
                name: (
                    torch.randn(layout.shape(name)[0], rank, generator=generator).to(dtype),
                    torch.randn(rank, layout.shape(name)[1], generator=generator).to(dtype),
                    weights,
                )
                for name in names
            },
        )

    return make


@pytest.fixture(scope="session")
def make_plan(layout: Layout, lora_plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """A maker of plans to train the three projections with rank 4."""

    def make(**changes: Any) -> Plan:
        values: dict[str, Any] = {
            "run": "a-run",
            "round": 3,
            "node": "phone",
            "nonce": "0123456789abcdef",
            "layout": layout.fingerprint,
            "base_model": "tiny",
            "base_digest": hashlib.sha256(b"base").hexdigest(),
            "family": "low_rank",
            "action": "train",
            "preset": "braid",
            "rank": 4,
            "alpha": 8.0,
            "rslora": False,
            "dropout": 0.0,
            "target_modules": ("q_proj", "up_proj", "down_proj"),
            "init": "random",
            "train_a": True,
            "start": "fresh",
            "sends": "factors",
            "seed": 1,
            "shared_seed": 2,
            "local_steps": 1,
            "batch_size": 1,
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "warmup_steps": 0,
            "max_length": 16,
            "dtype": "float32",
            "wire_dtype": None,
            "threads": 1,
            "evaluate": True,
            "deadline_seconds": 10.0,
            "max_norm": None,
            "accelerate": True,
            "data": {"source": "file", "nested": {"depth": 2}},
        }
        return lora_plan(**values | changes)

    return make


@pytest.fixture(scope="session")
def make_reply(make_plan: Callable[..., Plan]) -> Callable[..., bytes]:
    """A maker of honest replies to a plan, but for what ``changes`` says."""

    def make(update: Any, plan: Plan | None = None, **changes: Any) -> bytes:
        asked = plan or make_plan()
        report = Report(
            examples=7,
            train_loss=1.5,
            evaluation=Evaluation(loss_sum=3.0, tokens=5, correct=2, examples=1),
        )
        values = {
            "run": asked.run,
            "round": asked.round,
            "node": asked.node,
            "nonce": asked.nonce,
            "layout": asked.layout,
            "base_digest": asked.base_digest,
            "report": report,
            "update": update,
            "dtype": asked.wire_dtype,
            "train_a": asked.train_a,
        }
        return encode_reply(**(values | changes))

    return make


@pytest.fixture(scope="session")
def forge() -> Callable[..., bytes]:
    """Change a reply's envelope and body as a forger would: the body's digest fits again."""

    def apply(reply: bytes, *, envelope: Change | None = None, body: Change | None = None) -> bytes:
        header, tensors = unpack(reply)
        if body is not None:
            inner_header, inner = unpack(tensors["body"].numpy().tobytes())
            body(inner_header, inner)
            content = pack(inner_header, inner)
            tensors["body"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            header["envelope"]["payload_digest"] = hashlib.sha256(content).hexdigest()
        if envelope is not None:
            envelope(header["envelope"], tensors)
        return pack(header, tensors)

    return apply


@pytest.fixture(scope="session")
def raw() -> Callable[..., bytes]:
    """Bytes in safetensors' form with any header: a mapping, or the header's own bytes."""

    def make(header: Mapping[str, Any] | bytes, content: bytes = b"") -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content

    return make
