"""The gate: the only door for a node's bytes. What passes is an update; what does not has a verdict.

A reply with a signature is checked for who it is from before anything of its update is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aggregators.basis import Basis
from aggregators.bounds import LARGEST_NORM
from aggregators.codec import WIRE_DTYPES, made_pair, pair_parts, unpack, update_from_parts
from aggregators.cohort import Cohort
from aggregators.cohort_checks import check_cohort
from aggregators.cohort_codec import read_cohort
from aggregators.exact_numbers import DIGITS
from aggregators.factor_scalars import FactorScalars
from aggregators.layout import Layout
from aggregators.messages import (
    Envelope,
    Plan,
    Report,
    body_digest,
    open_body,
    open_envelope,
)
from aggregators.methods import (
    CohortMethod,
    HybridMethod,
    LoraMethod,
    SketchMethod,
    ZerothOrderMethod,
)
from aggregators.pair import Pair
from aggregators.probe_checks import (
    check_coordinates,
    check_factors,
    check_scalars,
    check_sketch,
)
from aggregators.projected import ProjectedGradient
from aggregators.seed_scalars import SeedScalars
from aggregators.shared_factors import shared_a
from aggregators.signatures import Signature, check_signature, split_signature
from aggregators.sketch import Sketch
from aggregators.targets import match_targets, trained_names
from aggregators.totals import beyond
from aggregators.update import Update, UpdateRejected, Verdict

# Of a number in an exact sum, where a node's message may have one byte.
EXACT_BYTES = 4 * DIGITS
# Of the norm of a sum: stacks that an edge has cut are float32, and members may be at the limit.
ROUNDING = 1e-6


@dataclass(frozen=True)
class GateContext:
    """What the server knows when a reply arrives. ``view``: digest of what the node was sent,
    ``basis``: the round's, where sketches are asked for. ``public_key``: the node's, hexadecimal; where
    it is given, what that key has not signed is refused. ``seen_nonces``: of all admitted replies.
    ``max_bytes``, ``max_examples``: of one node; a cohort's follow from how many are asked in it.
    """

    layout: Layout
    plan: Plan
    seen_nonces: frozenset[str] = frozenset()
    max_bytes: int = 1 << 30
    max_examples: int = 10**7
    view: str | None = None
    basis: Basis | None = None
    public_key: str | None = None


@dataclass(frozen=True)
class Admitted:
    """What passed: the update (None for an evaluation), the report, the body's SHA-256.

    ``reply``: the bytes without the signature, which is None unless it was checked.
    """

    update: Update | Cohort | None
    report: Report
    payload_digest: str
    reply: bytes
    signature: Signature | None


def gate(payload: bytes, context: GateContext) -> Update:
    """The update in a node's reply. Raises UpdateRejected and nothing else."""
    update = admit(payload, context).update
    if update is None:
        raise UpdateRejected(Verdict.MALFORMED, "the reply holds no update")
    if isinstance(update, Cohort):
        raise UpdateRejected(Verdict.WRONG_FAMILY, "the reply is an edge's sum, and no one update")
    return update


def admit(payload: bytes, context: GateContext) -> Admitted:
    """Check everything that can be checked, cheapest first. Raises UpdateRejected and nothing else."""
    reply, signature = split_signature(payload)
    method = context.plan.method
    nodes = len(method.names) if isinstance(method, CohortMethod) else 1
    max_examples = context.max_examples * nodes
    envelope = open_envelope(reply, most_bytes(context))
    _check_identity(envelope, context)
    if context.public_key is not None:
        check_signature(envelope, signature, context.public_key)
    body = open_body(reply)
    if body_digest(body) != envelope.payload_digest:
        raise UpdateRejected(Verdict.MALFORMED, "the body is not what the envelope's digest says")
    if envelope.report.examples > max_examples:
        raise UpdateRejected(
            Verdict.WEIGHT,
            f"{envelope.report.examples} examples exceed the limit of {max_examples}",
        )
    if claimed := envelope.report.beyond(nodes):
        raise UpdateRejected(Verdict.WEIGHT, claimed)
    if context.view is not None and envelope.report.view != context.view:
        raise UpdateRejected(
            Verdict.DIVERGED,
            f"worked from the view {envelope.report.view[:12]!r}, it was sent {context.view[:12]!r}",
        )
    if envelope.report.base_format != context.plan.base_format:
        raise UpdateRejected(
            Verdict.DIVERGED,
            f"worked on the base as {envelope.report.base_format!r}, the plan asks for"
            f" {context.plan.base_format!r}",
        )
    if (named := envelope.report.residual) and named not in context.plan.history[1:]:
        raise UpdateRejected(
            Verdict.DIVERGED, f"began with a residual {named[:12]!r} that the plan does not name"
        )
    update: Update | Cohort | None = None
    if context.plan.action == "train":
        update = _read_update(body, context, envelope.report)
    elif body:
        raise UpdateRejected(Verdict.WRONG_FAMILY, "an update came with an evaluation")
    checked = signature if context.public_key is not None else None
    return Admitted(update, envelope.report, envelope.payload_digest, reply, checked)


def most_bytes(context: GateContext) -> int:
    """How long a reply may be: an edge's as its devices' together, with numbers of exact sums."""
    method = context.plan.method
    if isinstance(method, CohortMethod):
        return context.max_bytes * len(method.names) * EXACT_BYTES
    return context.max_bytes


def norm_of(update: Update | Cohort) -> float:
    """The norm of a change; of one along probes its mean over seeds, which takes no probe.

    Of a pair as of parts that change unlike tensors, which those of a plan do; of a cohort so of its
    families' means.
    """
    if isinstance(update, Cohort):
        return math.hypot(*(norm_of(mean) for mean in update.means))
    if isinstance(update, Pair):
        return math.hypot(*(norm_of(part) for part in update.parts))
    if isinstance(update, (SeedScalars, FactorScalars, ProjectedGradient)):
        return math.sqrt(update.expected_squared_norm())
    return math.sqrt(update.squared_norm())


def _check_identity(envelope: Envelope, context: GateContext) -> None:
    plan = context.plan
    if envelope.run != plan.run:
        raise UpdateRejected(Verdict.WRONG_RUN, f"run {envelope.run[:12]!r} is another run")
    if envelope.node != plan.node:
        raise UpdateRejected(
            Verdict.WRONG_NODE, f"claims to be {envelope.node[:64]!r}, {plan.node!r} was asked"
        )
    if envelope.round != plan.round:
        verdict = Verdict.STALE if envelope.round < plan.round else Verdict.WRONG_ROUND
        if envelope.nonce in context.seen_nonces:
            verdict = Verdict.REPLAYED
        raise UpdateRejected(verdict, f"answers round {envelope.round}, this is round {plan.round}")
    if envelope.nonce in context.seen_nonces:
        raise UpdateRejected(Verdict.DUPLICATE, "this reply was already counted")
    if envelope.nonce != plan.nonce:
        raise UpdateRejected(Verdict.WRONG_ROUND, "answers another question of this round")
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


def _read_update(body: bytes, context: GateContext, report: Report) -> Update | Cohort:
    header, tensors = unpack(body)
    method = context.plan.method
    if isinstance(method, CohortMethod) and header.get("family") == method.family:
        cohort = read_cohort(header, tensors, context.layout)
        means = check_cohort(
            cohort, method, report.examples, context.layout, context.basis, context.max_examples
        )
        found = [_check_norm(mean, method, context, 1 + ROUNDING) for mean in means]
        _check_apart(cohort, context)
        # Members' changes may cancel out: their sum is nothing new then, and no defect.
        found += [m.norm or 0.0 for m in cohort.members if m.verdict is Verdict.ACCEPTED]
        _check_change(max(found), report)
        return cohort
    update = _read(header, tensors, method, context)
    _check_change(_check_norm(update, method, context), report)
    return update


def _check_change(norm: float, report: Report) -> None:
    if norm == 0.0 and not report.unchanged:
        raise UpdateRejected(
            Verdict.EMPTY, "every number is zero: there is no change, and the report names none"
        )
    if norm > 0.0 and report.unchanged:
        raise UpdateRejected(Verdict.MALFORMED, "a change came with a report that there is none")


def _read(
    header: dict[str, Any], tensors: dict[str, Tensor], method: Any, context: GateContext
) -> Update:
    """What a method asks for, of header and tensors; of either part of a pair by its own method."""
    if header.get("family") != method.family:
        raise UpdateRejected(
            Verdict.WRONG_FAMILY,
            f"family {str(header.get('family'))[:32]!r}, the plan asks for {method.family!r}",
        )
    layout = context.layout
    if isinstance(method, HybridMethod):
        parts = pair_parts(header, tensors, layout)
        methods = (method.lower, method.upper)
        return made_pair(
            [
                _read(fields, own, asked, context)
                for (fields, own), asked in zip(parts, methods, strict=True)
            ]
        )
    if isinstance(method, LoraMethod) and header.get("layout") == layout.fingerprint:
        _check_tensors(tensors, method, context)
        if not method.train_a:
            tensors = _with_shared_a(tensors, method, layout)
    update = update_from_parts(header, tensors, layout)
    if isinstance(update, SeedScalars):
        names = _reached(method, layout)
        check_scalars(update, method, names, context.plan.local_steps)
    elif isinstance(update, FactorScalars):
        check_factors(update, method, trained_names(layout, method.target_modules, method.layers))
        check_scalars(update.scalars, method, None, context.plan.local_steps)
    elif isinstance(update, ProjectedGradient):
        check_coordinates(update, method)
    elif isinstance(update, Sketch):
        check_sketch(update, context.basis)
        assert context.basis is not None
        missing = context.basis.names - update.views.keys() - update.whole.keys()
        if missing and method.subset == "all":
            raise UpdateRejected(Verdict.SHAPE, f"layer {min(missing)!r} has no coordinates")
    return update


def _reached(method: ZerothOrderMethod, layout: Layout) -> list[str] | None:
    """The tensors that a plan's probes reach; None for all."""
    names = trained_names(layout, method.target_modules, method.layers)
    return names if len(names) < len(layout) else None


def _check_tensors(tensors: dict[str, Tensor], method: LoraMethod, context: GateContext) -> None:
    """Names, ranks and types against the plan, before anything is converted or multiplied."""
    plan, layout = context.plan, context.layout
    allowed = set(match_targets(layout, method.target_modules, method.layers))
    limit = method.rank * (2 if method.sends == "delta" else 1)
    if not tensors:
        raise UpdateRejected(Verdict.MALFORMED, "the update changes no tensor")
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("#")
        if name not in allowed:
            text = "is not one that the plan adapts" if name in layout else "is not in the layout"
            raise UpdateRejected(Verdict.UNKNOWN_TENSOR, f"layer {name or key!r} {text}")
        if part not in ("A", "B"):
            continue
        if tensor.ndim == 2:
            rank = tensor.shape[1] if part == "B" else tensor.shape[0]
            if rank > limit:
                raise UpdateRejected(
                    Verdict.RANK, f"layer {name!r}: rank {rank} exceeds the plan's {limit}"
                )
        if plan.wire_dtype is not None and tensor.dtype != WIRE_DTYPES[plan.wire_dtype]:
            raise UpdateRejected(
                Verdict.DTYPE,
                f"layer {name!r}: {part} has the type {tensor.dtype}, the plan asks for"
                f" {plan.wire_dtype}",
            )
    if missing := allowed - {key.rpartition("#")[0] for key in tensors}:
        raise UpdateRejected(
            Verdict.SHAPE, f"layer {min(missing)!r}, which the plan adapts, is missing"
        )


def _with_shared_a(
    tensors: dict[str, Tensor], method: LoraMethod, layout: Layout
) -> dict[str, Tensor]:
    """Add the A that a node with a fixed A did not send. One that it did send is refused."""
    complete = dict(tensors)
    for key, b in tensors.items():
        name, _, part = key.rpartition("#")
        if part in ("A", "A.s"):
            raise UpdateRejected(Verdict.MALFORMED, f"layer {name!r}: A is fixed, and was sent")
        if part == "B" and b.ndim == 2 and b.shape[1] > 0:
            tensor_id, columns = layout.tensor_id(name), layout.shape(name)[1]
            complete[f"{name}#A"] = shared_a(method.shared_seed, tensor_id, b.shape[1], columns)
    return complete


def _check_norm(update: Update, method: Any, context: GateContext, slack: float = 1.0) -> float:
    """The change's norm, if it is within ``slack`` times the limit."""
    norm = norm_of(update)
    if isinstance(update, Sketch) and context.basis is not None:
        # What a sketch is read as may be far longer than its coordinates.
        read = update.reconstruct(context.basis, _is_within(method)).squared_norm()
        whole = update.whole_change().squared_norm() if update.whole else 0.0
        norm = max(norm, math.sqrt(read + whole))
    return _within_limit(norm, slack * _limit(context))


def _check_apart(cohort: Cohort, context: GateContext) -> None:
    """Norms where tensors are means over the members that have them, as they enter the aggregate.

    Members have unlike tensors there, so that the mean may be longer than each of them; but tensors
    that all members have are together no longer than the longest member, nor is any other alone.
    """
    for total, mean in zip(cohort.totals, cohort.means, strict=True):
        if apart := beyond([total]):
            _within_limit(norm_of(mean), _limit(context) * math.sqrt(1 + len(apart)))


def _is_within(method: Any) -> bool:
    """Whether a plan's sketches, or those of an edge's devices, are of changes within the basis."""
    if isinstance(method, CohortMethod):
        return any(_is_within(group.method) for group in method.groups)
    return isinstance(method, SketchMethod) and method.within


def _limit(context: GateContext) -> float:
    limit = context.plan.max_norm
    return min(LARGEST_NORM, math.inf if limit is None else limit)


def _within_limit(norm: float, limit: float) -> float:
    if not math.isfinite(norm):
        raise UpdateRejected(Verdict.NOT_FINITE, "the change's norm is not finite")
    if norm > limit:
        raise UpdateRejected(
            Verdict.NORM, f"the change's norm {norm:.4g} exceeds the limit of {limit:g}"
        )
    return norm
