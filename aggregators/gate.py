"""The gate: the only door for a node's bytes. What passes is an update; what does not has a verdict."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from aggregators.codec import unpack, update_from_parts
from aggregators.dense import Dense
from aggregators.layout import Layout
from aggregators.low_rank import LowRank
from aggregators.messages import Envelope, Plan, Report, open_reply, shared_a
from aggregators.update import Update, UpdateRejected, Verdict

ALL_LINEAR = "all-linear"
NOT_LINEAR = ("embed", "wte", "wpe", "lm_head")


@dataclass(frozen=True)
class GateContext:
    """What the server knows when a reply arrives."""

    layout: Layout
    plan: Plan
    seen_nonces: frozenset[str] = frozenset()
    max_bytes: int = 1 << 30
    max_examples: int = 10**7


@dataclass(frozen=True)
class Admitted:
    """What passed: the update (None for an evaluation), the report, the body's SHA-256."""

    update: Update | None
    report: Report
    payload_digest: str


def gate(payload: bytes, context: GateContext) -> Update:
    """The update in a reply. Raises UpdateRejected and nothing else."""
    update = admit(payload, context).update
    if update is None:
        raise UpdateRejected(Verdict.MALFORMED, "the reply holds no update")
    return update


def admit(payload: bytes, context: GateContext) -> Admitted:
    """Check everything that can be checked, cheapest first. Raises UpdateRejected and nothing else."""
    envelope, body = open_reply(payload, context.max_bytes)
    _check_identity(envelope, context)
    if hashlib.sha256(body).hexdigest() != envelope.payload_digest:
        raise UpdateRejected(Verdict.MALFORMED, "the body is not what the envelope's digest says")
    if envelope.report.examples > context.max_examples:
        raise UpdateRejected(
            Verdict.WEIGHT,
            f"{envelope.report.examples} examples exceed the limit of {context.max_examples}",
        )
    update = None
    if context.plan.action == "train":
        update = _read_update(body, context)
        _check_update(update, context)
    elif body:
        raise UpdateRejected(Verdict.WRONG_FAMILY, "an update came with an evaluation")
    return Admitted(update, envelope.report, envelope.payload_digest)


def match_targets(layout: Layout, target_modules: Sequence[str]) -> list[str]:
    """The weights that a list of module names means, in the layout's order.

    A name matches a module's last component or a dotted suffix of its path, as in peft.
    "all-linear" means every matrix but embeddings and the head.
    """
    found = []
    for spec in layout.tensors:
        path, _, leaf = spec.name.rpartition(".")
        if leaf != "weight" or len(spec.shape) != 2:
            continue
        linear = not any(word in path for word in NOT_LINEAR)
        for target in target_modules:
            if (target == ALL_LINEAR and linear) or f".{path}".endswith(f".{target}"):
                found.append(spec.name)
                break
    return found


def _check_identity(envelope: Envelope, context: GateContext) -> None:
    plan = context.plan
    if envelope.run != plan.run:
        raise UpdateRejected(Verdict.WRONG_RUN, f"run {envelope.run[:12]!r} is another run")
    if envelope.node != plan.node:
        raise UpdateRejected(
            Verdict.WRONG_NODE, f"claims to be {envelope.node[:64]!r}, {plan.node!r} was asked"
        )
    if envelope.nonce in context.seen_nonces:
        raise UpdateRejected(Verdict.DUPLICATE, "this reply was already counted")
    if envelope.round != plan.round or envelope.nonce != plan.nonce:
        raise UpdateRejected(
            Verdict.WRONG_ROUND, f"answers round {envelope.round}, this is round {plan.round}"
        )
    if envelope.layout != plan.layout:
        raise UpdateRejected(
            Verdict.WRONG_LAYOUT,
            f"layout {envelope.layout[:12]} is not the run's {plan.layout[:12]}",
        )
    if envelope.base_digest != plan.base_digest:
        raise UpdateRejected(
            Verdict.WRONG_BASE,
            f"base model {envelope.base_digest[:12]} is not the run's {plan.base_digest[:12]}",
        )


def _read_update(body: bytes, context: GateContext) -> Update:
    header, tensors = unpack(body)
    if header.get("family") != context.plan.family:
        raise UpdateRejected(
            Verdict.WRONG_FAMILY,
            f"family {str(header.get('family'))[:32]!r}, the plan asks for {context.plan.family!r}",
        )
    if not context.plan.train_a:
        tensors |= _shared_factors(tensors, context)
    return update_from_parts(header, tensors, context.layout)


def _shared_factors(tensors: dict[str, Tensor], context: GateContext) -> dict[str, Tensor]:
    """The A that a node with a fixed A did not send; one that it did send is not taken."""
    factors = {}
    for key, b in tensors.items():
        name = key.removesuffix("#B")
        if key == name or name not in context.layout or b.ndim != 2:
            continue
        if not 1 <= b.shape[1] <= context.plan.rank:
            raise _rank_problem(name, b.shape[1], context.plan.rank)
        factors[f"{name}#A"] = shared_a(
            context.plan.shared_seed,
            context.layout.tensor_id(name),
            b.shape[1],
            context.layout.shape(name)[-1],
        )
    return factors


def _check_update(update: Update, context: GateContext) -> None:
    plan = context.plan
    allowed = set(match_targets(context.layout, plan.target_modules))
    names = update.factors if isinstance(update, LowRank) else update.dense()
    for name in names:
        if name not in allowed:
            raise UpdateRejected(
                Verdict.UNKNOWN_TENSOR, f"layer {name!r} is not one that the plan adapts"
            )
    if isinstance(update, LowRank):
        limit = plan.rank * (2 if plan.sends == "delta" else 1)
        for name, rank in update.ranks.items():
            if rank > limit:
                raise _rank_problem(name, rank, limit)
        missing = allowed - update.factors.keys()
        if missing:
            raise UpdateRejected(Verdict.MALFORMED, f"layer {min(missing)!r} is missing")
    assert isinstance(update, (LowRank, Dense))
    norm = math.sqrt(update.squared_norm())
    if not math.isfinite(norm):
        raise UpdateRejected(Verdict.NOT_FINITE, "the change's norm is not finite")
    if plan.max_norm is not None and norm > plan.max_norm:
        raise UpdateRejected(
            Verdict.NORM, f"the change's norm {norm:.4g} exceeds the limit of {plan.max_norm:g}"
        )


def _rank_problem(name: str, rank: int, limit: int) -> UpdateRejected:
    return UpdateRejected(Verdict.RANK, f"layer {name!r}: rank {rank} exceeds the plan's {limit}")
