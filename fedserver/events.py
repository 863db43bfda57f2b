"""What happens during a run, as values: the round loop emits events, views consume them.

A view (a terminal table, JSON lines, a dashboard) is any callable that takes one event. Events
carry plain numbers and text only, so that every one of them is also one JSON object.

The evaluation of round ``t`` may arrive after round ``t + 1`` has started: nodes evaluate the model
that they receive, so the loss of round ``t`` comes with their replies of the next round. A view
therefore files an event under the round that it names, not under the round that is running.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, get_args

BASE_ROUND = 0
"""The round number of the untouched base model in :class:`EvaluationDone`."""

ACCEPTED = "accepted"
"""The verdict of a reply that went into the aggregate; every other verdict is a refusal."""


@dataclasses.dataclass(frozen=True)
class NodeInfo:
    """A node of the cohort as the run sees it: its limits, the size of its data, and what it is.

    ``device``, ``threads``, ``memory_bytes``, ``accelerator_memory_bytes`` (None where it has no
    accelerator) and ``version`` (of its programs) are what the node says of itself.
    """

    node: str
    sends: str
    examples: int
    held_out: int
    description: str = ""
    device: str = ""
    threads: int | None = None
    memory_bytes: int | None = None
    version: str = ""
    accelerator_memory_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss in nats per answer token, its exponential, and the share of tokens predicted right.

    ``new_loss``: over the ``new_tokens`` of examples that the training data do not repeat, None where
    that is all of them.
    """

    loss: float
    perplexity: float
    accuracy: float
    tokens: int
    new_loss: float | None = None
    new_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class RunStarted:
    """The first event. ``first_round`` is above 1 when a run continues after an interruption.

    ``model_bytes_a_node``: what a node would move in a round if it exchanged all weights, in float32;
    ``lora_bytes_a_rank``: for LoRA factors, a unit of its rank. ``real_time``: deadlines are of the
    machine's clock, not of a simulation's.
    """

    name: str
    preset: str
    rounds: int
    first_round: int
    nodes: tuple[NodeInfo, ...]
    base_model: str
    output: str
    model_bytes_a_node: int = 0
    lora_bytes_a_rank: int = 0
    real_time: bool = False
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class RoundStarted:
    """Plans of this round are on their way to the nodes."""

    round: int


@dataclasses.dataclass(frozen=True)
class PhaseStarted:
    """A round (or an evaluation at the end) goes over to its next phase.

    ``phase``: "plan", "train" (plans are sent and replies judged as they arrive), "evaluate",
    "aggregate", "commit", "paused", or "held" where the run waits for what ``reason`` says. In "train"
    and "evaluate" ``deadline_seconds`` run, ``nodes`` have been asked, and ``quorum`` updates are
    needed.
    """

    round: int
    phase: str
    nodes: int = 0
    quorum: int = 0
    deadline_seconds: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class PlansSent:
    """The plans of a round, ``bytes`` in all, have been handed to the transport; now nodes work."""

    round: int
    nodes: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class NodeStarted:
    """A node has received its plan."""

    round: int
    node: str


@dataclasses.dataclass(frozen=True)
class NodeProgress:
    """A node has done ``step`` of ``steps`` local steps; ``loss`` is that of the last one."""

    round: int
    node: str
    step: int
    steps: int
    loss: float | None


@dataclasses.dataclass(frozen=True)
class NodeReplied:
    """A node's reply has passed the gate, or has not: then ``verdict`` and ``reason`` say why.

    ``seconds``: the node's own work, as it says; ``gate_seconds``: the server's judging of the reply.
    """

    round: int
    node: str
    verdict: str
    reason: str
    sends: str
    train_loss_first: float | None
    train_loss: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    family: str = ""
    gate_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class EvaluationDone:
    """The model after ``round`` (``BASE_ROUND``: the base model) on all held-out examples."""

    round: int
    loss: float
    perplexity: float
    accuracy: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class RoundCommitted:
    """A round is durable in the ledger; ``head`` is the ledger's hash afterwards.

    ``loss`` is the weighted training loss of the accepted replies, ``carry_rank`` the rank of the
    running sum, ``tail_energy`` the share (0 to 1) of its norm that the nodes' view leaves out.
    ``quorum``: whether enough updates came; without it the model stayed as it was.
    """

    round: int
    loss: float | None
    accepted: int
    rejected: int
    bytes_up: int
    bytes_down: int
    seconds: float
    carry_rank: int
    tail_energy: float
    head: str
    quorum: bool = True


@dataclasses.dataclass(frozen=True)
class Notice:
    """Something worth a line. ``level``: "info", "warning" or "error"."""

    level: str
    text: str


@dataclasses.dataclass(frozen=True)
class RoundsEnded:
    """The coordinator has left the loop.

    ``outcome``: finished, no_quorum (its last rounds counted nothing), stopped, interrupted or failed.
    """

    outcome: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class FamilyWork:
    """What the nodes of one family of updates did in a run: bytes, seconds of work, and what it adds.

    ``contribution``: nats a token that the loss would be higher without it; None: not evaluated.
    """

    family: str
    nodes: int
    bytes_up: int
    bytes_down: int
    seconds: float
    contribution: float | None


@dataclasses.dataclass(frozen=True)
class RunFinished:
    """The last event. Paths are empty where nothing was written. Bytes: of all messages of the run.

    ``without_quorum``: the rounds that counted nothing, for too few updates came. ``rounds``: how many
    were committed, fewer than planned where an operator stopped it. ``evaluated``: where there is no
    ``after``, the newest model that was evaluated, that of ``evaluated_round``.
    """

    before: Evaluation | None
    after: Evaluation | None
    seconds: float
    head: str
    report: str
    adapter: str
    bytes_up: int | None = None
    bytes_down: int | None = None
    families: tuple[FamilyWork, ...] = ()
    without_quorum: tuple[int, ...] = ()
    rounds: int | None = None
    evaluated: Evaluation | None = None
    evaluated_round: int = BASE_ROUND


Event: TypeAlias = (
    RunStarted
    | RoundStarted
    | PhaseStarted
    | PlansSent
    | NodeStarted
    | NodeProgress
    | NodeReplied
    | EvaluationDone
    | RoundCommitted
    | Notice
    | RoundsEnded
    | RunFinished
)
Listener: TypeAlias = Callable[[Event], None]


def to_json(event: Event) -> dict[str, object]:
    """An event as one JSON object: ``event`` names it ("round_started"), the rest is its fields.

    Numbers that JSON does not have (NaN, infinities) become null.
    """
    return {
        "event": _name(type(event)),
        **{k: _plain(v) for k, v in dataclasses.asdict(event).items()},
    }


def from_json(told: Mapping[str, Any]) -> Event | None:
    """The event that a JSON object is, None for what this version does not know, or cannot read back.

    Numbers that JSON does not have come back as NaN.
    """
    kind = KINDS.get(str(told.get("event")))
    if kind is None:
        return None
    given: dict[str, Any] = {}
    for part in dataclasses.fields(kind):
        if part.name in told:
            value = told[part.name]
            given[part.name] = math.nan if value is None and part.type == "float" else value
    try:
        if kind is RunStarted:
            given["nodes"] = tuple(NodeInfo(**node) for node in given["nodes"])
        return kind(**given)
    except (TypeError, KeyError):
        return None


def _name(kind: type[Event]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


# What a log holds of a run under way; its end (RunFinished) is made from its summary.
KINDS: dict[str, type[Event]] = {
    _name(kind): kind for kind in get_args(Event) if kind is not RunFinished
}
