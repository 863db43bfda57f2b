"""One honest reply of every family, and what the gate knows when it arrives: to be damaged by others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from aggregators import (
    Basis,
    Dense,
    FactorScalars,
    GateContext,
    Layout,
    LowRank,
    Pair,
    ProjectedGradient,
    SeedScalars,
    Sketch,
    Update,
    Verdict,
)
from aggregators.codec import encode, pack, unpack
from aggregators.cohort import Cohort, CohortMember
from aggregators.cohort_codec import cohort_parts
from aggregators.messages import Evaluation, Plan, Report, body_digest, encode_reply
from aggregators.methods import (
    CohortGroup,
    CohortMethod,
    FactorMethod,
    HybridMethod,
    LoraMethod,
    Method,
    ProjectedMethod,
    SketchMethod,
    ZerothOrderMethod,
)
from aggregators.shared_factors import factor_layout

QUERY, DOWN, NORM = "layers.0.q_proj.weight", "layers.0.down_proj.weight", "norm.weight"
LAYOUT = Layout(
    {"embed_tokens.weight": (11, 6), QUERY: (12, 10), DOWN: (10, 14), NORM: (6,), "t": ()}
)
MAX_NORM = 1e4
MEMBERS = {"a": 1, "b": 2, "c": 4}  # of the cohort, and their examples
Change = Callable[[dict[str, Any], dict[str, Any]], None]


@dataclass(frozen=True)
class Specimen:
    """``reply`` is what an honest node answers in ``context``; ``main`` names its largest tensor.

    ``direct``: nothing asks for this family, so that only ``decode`` reads it and no gate admits it.
    """

    family: str
    update: Update | Cohort
    context: GateContext
    main: str
    direct: bool = False

    def reply(self) -> bytes:
        """The honest reply's bytes."""
        plan = self.context.plan
        report = Report(
            examples=7,
            train_loss=1.5,
            train_tokens=99,
            steps=4,
            evaluation=Evaluation(loss_sum=3.0, tokens=5, correct=2, examples=1),
            view="5" * 64,
        )
        return encode_reply(
            run=plan.run, round=plan.round, node=plan.node, nonce=plan.nonce, layout=plan.layout,
            base_digest=plan.base_digest, report=report, update=self.update, dtype=None,
        )  # fmt: skip

    def with_key(self, public: str) -> Specimen:
        """The same, of a node that has a key."""
        return replace(self, context=replace(self.context, public_key=public))


def specimens() -> dict[str, Specimen]:
    """By family."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    basis = Basis.random(LAYOUT, [spec.name for spec in LAYOUT], 5, 2, 1)
    lora = LoraMethod(
        target_modules=("q_proj", "down_proj"), rank=4, alpha=8.0, rslora=False, dropout=0.0,
        init="random", train_a=True, start="fresh", sends="factors", shared_seed=2, weight_decay=0.0,
        warmup_steps=0,
    )  # fmt: skip
    pool = ZerothOrderMethod(master_seed=9, pool_size=64, probe="rank1", epsilon=1e-3, clip=None)
    random = ProjectedMethod(
        target_modules=(), master_seed=9, probe="rademacher", coordinates={QUERY: 5, NORM: 3},
        optimiser="sgd", error_feedback=False,
    )  # fmt: skip
    adaptive = SketchMethod(
        target_modules=(), master_seed=5, optimiser="sgd", error_feedback=False, rank=2,
        oversampling=1,
    )  # fmt: skip
    along_factors = FactorMethod(
        master_seed=9, pool_size=64, probe="rank1", epsilon=1e-3, clip=None,
        target_modules=("q_proj", "down_proj"), rank=3, scale=0.5, shared_seed=2,
    )  # fmt: skip
    hybrid = HybridMethod(
        lower=pool.model_copy(update={"target_modules": ("q_proj",)}),
        upper=lora.model_copy(update={"target_modules": ("down_proj",)}),
        upper_learning_rate=1e-3,
    )
    change = {spec.name: normal(*spec.shape) for spec in LAYOUT}
    factors = {
        name: (normal(LAYOUT.shape(name)[0], 3), normal(3, LAYOUT.shape(name)[1]), 0.5)
        for name in (QUERY, DOWN)
    }
    coordinates = {QUERY: normal(5), NORM: normal(3)}
    found = [
        Specimen("low_rank", LowRank(LAYOUT, factors), _context(lora), f"{QUERY}#B"),
        Specimen(
            "seed_scalars",
            SeedScalars(LAYOUT, 9, 64, [3, 8, 60], [1e-3, -2e-3, 5e-4], "rank1"),
            _context(pool),
            "numbers",
        ),
        Specimen(
            "projected_gradient",
            ProjectedGradient(LAYOUT, 9, coordinates),
            _context(random),
            "numbers",
        ),
        Specimen(
            "factor_scalars",
            FactorScalars(
                LAYOUT,
                [QUERY, DOWN],
                3,
                0.5,
                2,
                SeedScalars(
                    factor_layout(LAYOUT, [QUERY, DOWN], 3),
                    9,
                    64,
                    [3, 8, 60],
                    [1e-3, -2e-3, 5e-4],
                    "rank1",
                ),
            ),
            _context(along_factors),
            "numbers",
        ),
        Specimen(
            "pair",
            Pair(
                [
                    SeedScalars(LAYOUT, 9, 64, [3, 8, 60], [1e-3, -2e-3, 5e-4], "rank1", [QUERY]),
                    LowRank(LAYOUT, {DOWN: factors[DOWN]}),
                ]
            ),
            _context(hybrid),
            f"1.{DOWN}#B",
        ),
        Specimen("sketch", Sketch.of(LAYOUT, basis, change), _context(adaptive, basis), "numbers"),
        Specimen(
            "cohort",
            _cohort(LowRank(LAYOUT, factors), Sketch.of(LAYOUT, basis, change)),
            _context(_cohort_method(lora, adaptive), basis),
            f"0.{QUERY}#B",
        ),
        Specimen("dense", Dense(LAYOUT, change), _context(lora), f"{QUERY}#D", direct=True),
    ]
    return {one.family: one for one in found}


def content(update: Update | Cohort) -> bytes:
    """An update's bytes, or a cohort's."""
    return pack(*cohort_parts(update)) if isinstance(update, Cohort) else encode(update)


def forge(reply: bytes, *, envelope: Change | None = None, body: Change | None = None) -> bytes:
    """Change a reply as a forger would: the digest of the body fits again."""
    header, tensors = unpack(reply)
    if body is not None:
        inner_header, inner = unpack(tensors["body"].numpy().tobytes())
        body(inner_header, inner)
        return with_body(reply, pack(inner_header, inner))
    if envelope is not None:
        envelope(header["envelope"], tensors)
    return pack(header, tensors)


def with_body(reply: bytes, body: bytes) -> bytes:
    """A reply with other bytes as its update, under a digest that fits."""
    header, _ = unpack(reply)
    header["envelope"]["payload_digest"] = body_digest(body)
    # Of no bytes torch makes no tensor.
    content = torch.frombuffer(bytearray(body or b"\0"), dtype=torch.uint8)[: len(body)]
    return pack(header, {"body": content})


def _cohort(stack: LowRank, seen: Sketch) -> Cohort:
    """Of seven examples. Members say no norms, beside which a sum of zeros would be sound."""
    members = [
        CohortMember(node=name, verdict=Verdict.ACCEPTED, examples=examples, payload="a" * 64)
        for name, examples in MEMBERS.items()
    ]
    updates: list[tuple[Update, float]] = [(stack, 1), (stack * 0.5, 2), (seen, 4)]
    return Cohort.of(updates, members)


def _cohort_method(lora: LoraMethod, adaptive: SketchMethod) -> CohortMethod:
    names = list(MEMBERS)
    return CohortMethod(groups=(_group(lora, names[:2]), _group(adaptive, names[2:])))


def _group(method: LoraMethod | SketchMethod, names: list[str]) -> CohortGroup:
    return CohortGroup(
        action="train", method=method, local_steps=1, batch_size=1, learning_rate=1e-3,
        base_format="full", wire_dtype=None, view="5" * 64, sent="6" * 64,
        members=tuple((name, "0" * 32, 1) for name in names),
    )  # fmt: skip


def _context(method: Method, basis: Basis | None = None) -> GateContext:
    plan = Plan(
        run="a-run", round=3, node="phone", nonce="0123456789abcdef", layout=LAYOUT.fingerprint,
        base_model="tiny", base_digest="b" * 64, action="train", preset="mixed", method=method,
        seed=1, local_steps=1, batch_size=1, learning_rate=1e-3, max_length=16, dtype="float32",
        wire_dtype=None, threads=1, accelerate=True, evaluate=True, deadline_seconds=10.0,
        max_norm=MAX_NORM,
    )  # fmt: skip
    return GateContext(
        LAYOUT, plan, frozenset({"c" * 16}), max_bytes=1 << 20, max_examples=1000, view="5" * 64,
        basis=basis,
    )  # fmt: skip
