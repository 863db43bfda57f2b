"""The messages that both sides speak: what a node can do, the plan down, the reply up.

Each is one bytes object: the number of objects, not of bytes, costs time in Flower's transport.
No message holds a clock, so equal work has equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from aggregators.bounds import (
    LARGEST_LOSS,
    MOST_COUNTED,
    MOST_DEVICES,
    MOST_LOSS_SUM,
    ROUNDED_UP,
    Count,
    Loss,
    LossSum,
    Sum,
)
from aggregators.codec import pack, read_header, unpack, update_parts
from aggregators.cohort import Cohort
from aggregators.cohort_codec import cohort_parts
from aggregators.layout import Layout
from aggregators.methods import BaseFormat, CohortGroup, CohortMethod, LoraMethod, Method
from aggregators.update import Update, UpdateRejected, Verdict
from aggregators.view import SealedView, View, view_parts

SCHEMA = 1
MAX_EXAMPLES = 10**7  # of one node
MOST_HISTORY = 9
ENVELOPE_LIMIT = 1 << 16  # bytes; an honest one takes about 1,500
Name = Annotated[str, Field(min_length=1, max_length=64)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# What devices of one cohort may be asked otherwise than each other, but for name, nonce and seed.
GROUPED = (
    "action", "method", "local_steps", "batch_size", "learning_rate", "base_format", "wire_dtype",
    "history",
)  # fmt: skip
# Of an edge's deadline: what its devices have, so that their sum is in time.
DEVICE_SHARE = 0.8

WireDtype = Literal["float32", "bfloat16", "float16", "int8"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Plan(_Message):
    """What one node is asked to do in one round.

    ``history``: where the method has error feedback, the name under which the node files what its
    message leaves out, then the names of earlier rounds whose it may begin with, the newest first. Each
    is the digest of the ledger entry that the round's model came from.
    """

    run: str
    round: int = Field(ge=1)
    node: Name
    nonce: str = Field(pattern=r"^[0-9a-f]{16,64}$")
    layout: Digest
    base_model: str
    base_digest: Digest
    action: Literal["train", "evaluate"]
    preset: str
    method: Method
    seed: int = Field(ge=0, lt=2**63)
    local_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    max_length: int = Field(ge=1)
    dtype: str
    base_format: BaseFormat = "full"
    wire_dtype: WireDtype | None
    threads: int | None = Field(ge=1)
    accelerate: bool
    evaluate: bool
    deadline_seconds: float = Field(gt=0)
    max_norm: float | None = Field(gt=0)
    history: tuple[Digest, ...] = Field(default=(), max_length=MOST_HISTORY)
    data: dict[str, Any] | None = None

    @property
    def family(self) -> str:
        """The family of updates that the method makes."""
        return self.method.family

    @property
    def train_a(self) -> bool:
        """Whether a reply holds A; False where a LoRA plan fixes it, so that the server knows it."""
        return not isinstance(self.method, LoraMethod) or self.method.train_a

    @property
    def lora(self) -> LoraMethod:
        """The method, where it is LoRA. Raises TypeError where it is not."""
        if not isinstance(self.method, LoraMethod):
            raise TypeError(f"the plan asks for {self.family}, not for LoRA factors")
        return self.method


class Evaluation(_Message):
    """Sums over answer tokens: ``loss_sum`` in nats, ``correct`` greedy predictions.

    ``new_*`` are of those held-out examples whose question and answer the node does not train on.
    """

    loss_sum: LossSum
    tokens: Sum
    correct: Sum
    examples: Sum
    new_loss_sum: LossSum = 0.0
    new_tokens: Sum = 0

    @model_validator(mode="after")
    def _possible(self) -> Evaluation:
        if self.correct > self.tokens or self.new_tokens > self.tokens:
            raise ValueError("more tokens are right, or new, than there are")
        if self.examples > self.tokens:
            raise ValueError("more examples than answer tokens")
        for loss_sum, tokens in (
            (self.loss_sum, self.tokens),
            (self.new_loss_sum, self.new_tokens),
        ):
            if loss_sum > LARGEST_LOSS * tokens * ROUNDED_UP:
                raise ValueError(f"a loss above {LARGEST_LOSS:g} nats a token")
        return self


class Report(_Message):
    """What a node says of its work, beside the update itself. Losses are nats per token.

    ``view``: digest of the view that it worked from. ``weights``: digest of the weights that it made
    of it, where it made some, or of what stands beside a quantised base, and that base. Both are of the
    round's start. ``base_format``: what it held of the base, so what its evaluation is of. ``residual``:
    of the plan's history the name under which it found what its earlier messages left out; "" where it
    began without. ``unchanged``: training was sound and found nothing to change, so that the update is
    zero; one that is zero unsaid is a defect.

    The fields hold the sums of many devices; ``beyond`` has the limits of a number of them.
    """

    examples: int = Field(ge=1, le=MAX_EXAMPLES * MOST_DEVICES)
    train_loss: Loss | None = None
    train_loss_first: Loss | None = None
    train_tokens: Sum = 0
    steps: Sum = 0
    evaluation: Evaluation | None = None
    view: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    weights: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    base_format: BaseFormat = "full"
    residual: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    unchanged: bool = False

    def beyond(self, nodes: int) -> str:
        """What of it is more than so many nodes can have counted, in words; "" for an honest report."""
        limits: dict[str, float] = {
            "examples": MAX_EXAMPLES,
            "train_tokens": MOST_COUNTED,
            "steps": MOST_COUNTED,
        }
        told = {name: getattr(self, name) for name in limits}
        if self.evaluation is not None:
            for name, number in self.evaluation.model_dump().items():
                told[f"evaluation.{name}"] = number
                limits[f"evaluation.{name}"] = (
                    MOST_LOSS_SUM * ROUNDED_UP if name.endswith("loss_sum") else MOST_COUNTED
                )
        return next(
            (
                f"{name} {number:g} exceeds the limit of {nodes * limits[name]:g}"
                for name, number in told.items()
                if number > nodes * limits[name]
            ),
            "",
        )


class Envelope(_Message):
    """Whose reply this is, to what, over which bytes.

    ``payload_digest``: SHA-256 of the update's bytes, "" where none was asked for.
    """

    schema_version: Literal[1] = 1
    run: str
    round: int
    node: str
    nonce: str
    layout: str
    base_digest: str
    payload_digest: str
    report: Report

    def canonical(self) -> bytes:
        """What a node signs: JSON with sorted keys and no spaces."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False
        ).encode()


class DeviceCapabilities(_Message):
    """What the root needs to know of a device behind an edge: whom it asks for what."""

    node: Name
    examples: int = Field(ge=1)
    held_out: Count
    rank_limit: int = Field(ge=1)
    public_key: Digest | None = None


class Capabilities(_Message):
    """What a node has and can do. ``public_key``: of the key that signs its replies, if it has one.

    ``part``: the part of the scenario's data whose owner it plays; None: it has data of its own.
    ``accelerator_memory_bytes``: of the accelerator that it computes on, None where it has none.
    ``devices``: of an edge aggregator those behind it; what it says of itself is then their sum.
    """

    node: Name
    examples: int = Field(ge=1)
    held_out: Sum
    rank_limit: int = Field(ge=1)
    base_digest: Digest
    layout_json: str
    threads: int = Field(ge=1)
    memory_bytes: int = Field(ge=0)
    device: str
    accelerator_memory_bytes: Count | None = None
    versions: dict[str, str]
    public_key: Digest | None = None
    part: int | None = Field(default=None, ge=0)
    devices: tuple[DeviceCapabilities, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> Capabilities:
        if not self.devices and self.held_out > MOST_COUNTED:
            raise ValueError(f"held_out exceeds one node's limit of {MOST_COUNTED:g}")
        return self

    def to_bytes(self) -> bytes:
        """JSON."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Capabilities:
        """Read a node's answer; ValueError for anything else."""
        found = cls.model_validate_json(data)
        Layout.from_json(found.layout_json)
        return found


def encode_plan(plan: Plan, view: View, dtype: str | None) -> bytes:
    """A plan with the view of the global model that the node gets; ``dtype`` of its adapter."""
    fields, tensors = view_parts(view, dtype)
    header = {"schema": SCHEMA, "plan": plan.model_dump(mode="json"), "view": fields}
    return pack(header, tensors)


def seal_view(view: View, dtype: str | None) -> tuple[str, SealedView]:
    """A view as an edge passes it on, and the name that groups know it by: SHA-256 of its bytes."""
    fields, tensors = view_parts(view, dtype)
    return hashlib.sha256(pack(fields, tensors)).hexdigest(), SealedView(fields, tensors)


def encode_cohort_plan(plan: Plan, views: Mapping[str, SealedView]) -> bytes:
    """An edge's plan with the views that its devices get, each once, by the name of ``seal_view``."""
    header = {
        "schema": SCHEMA,
        "plan": plan.model_dump(mode="json"),
        "views": {name: sealed.header for name, sealed in views.items()},
    }
    tensors = {f"{n}.{k}": t for n, sealed in views.items() for k, t in sealed.tensors.items()}
    return pack(header, tensors)


def decode_cohort_plan(data: bytes) -> tuple[Plan, dict[str, SealedView]]:
    """What ``encode_cohort_plan`` wrote. Raises UpdateRejected for anything else."""
    header, tensors = unpack(data)
    plan = _read_plan(header)
    views = header.get("views")
    if not isinstance(plan.method, CohortMethod) or not isinstance(views, dict):
        raise UpdateRejected(Verdict.MALFORMED, "the plan is not for an edge aggregator")
    found: dict[str, SealedView] = {}
    for group in plan.method.groups:
        if not isinstance(views.get(group.sent), dict):
            raise UpdateRejected(Verdict.MALFORMED, f"the view {group.sent[:12]} is missing")
        prefix = f"{group.sent}."
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        found[group.sent] = SealedView(views[group.sent], own)
    return plan, found


def member_plans(plan: Plan) -> list[tuple[Plan, CohortGroup]]:
    """The plans of an edge's devices: what the edge's says of all of them, and what their group says."""
    assert isinstance(plan.method, CohortMethod)
    return [
        (
            plan.model_copy(
                update={
                    **{name: getattr(group, name) for name in GROUPED},
                    "deadline_seconds": plan.deadline_seconds * DEVICE_SHARE,
                    "node": node,
                    "nonce": nonce,
                    "seed": seed,
                }
            ),
            group,
        )
        for group in plan.method.groups
        for node, nonce, seed in group.members
    ]


def encode_member_plan(plan: Plan, view: SealedView) -> bytes:
    """A device's plan with the view that the edge got for it, in the form of every plan."""
    header = {"schema": SCHEMA, "plan": plan.model_dump(mode="json"), "view": view.header}
    return pack(header, view.tensors)


def decode_plan(data: bytes) -> tuple[Plan, SealedView]:
    """The plan, and the view that came with it. Raises UpdateRejected for anything else."""
    header, tensors = unpack(data)
    plan = _read_plan(header)
    if not isinstance(header.get("view"), dict):
        raise UpdateRejected(Verdict.MALFORMED, "the view is not a JSON object")
    return plan, SealedView(header["view"], tensors)


def _read_plan(header: Mapping[str, Any]) -> Plan:
    if header.get("schema") != SCHEMA:
        raise UpdateRejected(Verdict.MALFORMED, f"schema {header.get('schema')!r} is not {SCHEMA}")
    try:
        return Plan.model_validate(header["plan"])
    except (KeyError, ValueError, TypeError) as error:
        raise UpdateRejected(Verdict.MALFORMED, f"unreadable plan: {error}") from None


def encode_reply(
    *,
    run: str,
    round: int,
    node: str,
    nonce: str,
    layout: str,
    base_digest: str,
    report: Report,
    update: Update | Cohort | None,
    dtype: str | None,
    train_a: bool = True,
) -> bytes:
    """A node's reply. With ``train_a`` False the server knows A, so only B travels.

    ``update`` is None where the plan asked for an evaluation alone.
    """
    body = b"" if update is None else _encode_body(update, dtype, train_a)
    envelope = Envelope(
        run=run,
        round=round,
        node=node,
        nonce=nonce,
        layout=layout,
        base_digest=base_digest,
        payload_digest=body_digest(body),
        report=report,
    )
    content = torch.frombuffer(bytearray(body or b"\0"), dtype=torch.uint8)
    return pack({"envelope": envelope.model_dump(mode="json")}, {"body": content} if body else {})


def open_reply(data: bytes, max_bytes: int | None = None) -> tuple[Envelope, bytes]:
    """Envelope and body of a reply, unchecked against any plan. Raises UpdateRejected."""
    return open_envelope(data, max_bytes), open_body(data)


def open_envelope(data: bytes, max_bytes: int | None = None) -> Envelope:
    """The envelope of a reply; of the rest nothing is read. Raises UpdateRejected."""
    header = read_header(data, max_bytes, ENVELOPE_LIMIT)
    try:
        # Strict, by way of JSON: "12" is no number and True is not 1.
        return Envelope.model_validate_json(json.dumps(header["envelope"]), strict=True)
    except KeyError:
        raise UpdateRejected(Verdict.MALFORMED, "the reply has no envelope") from None
    except RecursionError:
        raise UpdateRejected(Verdict.MALFORMED, "the envelope is nested too deeply") from None
    except ValueError as error:
        raise _report_problem(error) from None


def open_body(data: bytes) -> bytes:
    """The update's bytes in a reply; b"" where it has none. Raises UpdateRejected."""
    _, tensors = unpack(data)
    body = tensors.get("body")
    if set(tensors) - {"body"} or (
        body is not None and (body.dtype != torch.uint8 or body.ndim != 1)
    ):
        raise UpdateRejected(Verdict.MALFORMED, "the reply's body is not one string of bytes")
    return b"" if body is None else body.numpy().tobytes()


def body_digest(body: bytes) -> str:
    """SHA-256 of an update's bytes; "" for none."""
    return hashlib.sha256(body).hexdigest() if body else ""


def _encode_body(update: Update | Cohort, dtype: str | None, train_a: bool) -> bytes:
    if isinstance(update, Cohort):
        return pack(*cohort_parts(update))
    header, tensors = update_parts(update, dtype)
    if not train_a:
        header["a"] = "shared"
        tensors = {k: v for k, v in tensors.items() if not k.endswith(("#A", "#A.s"))}
    return pack(header, tensors)


def _report_problem(error: ValueError) -> UpdateRejected:
    """Numbers out of range have verdicts of their own; the rest is a malformed envelope."""
    details: list[Any] = getattr(error, "errors", list)()
    for problem in details:
        where = ".".join(str(part) for part in problem["loc"])
        if where == "report.examples":
            return UpdateRejected(Verdict.WEIGHT, f"examples: {problem['msg']}")
        if problem["type"] == "finite_number":
            return UpdateRejected(Verdict.NOT_FINITE, f"{where} is NaN or infinite")
    first = details[0] if details else {"loc": (), "msg": str(error)}
    where = ".".join(str(part) for part in first["loc"])
    return UpdateRejected(Verdict.MALFORMED, f"envelope {where}: {first['msg']}")
