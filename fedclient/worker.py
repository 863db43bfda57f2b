"""What a node does with a plan: load its base and data, evaluate the view, train, answer.

The worker is the whole node behind the transport. It speaks bytes on both sides, so the in-process
grid, Ray and a SuperNode run the very same code.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from aggregators import Layout
from aggregators.gate import norm_of
from aggregators.messages import (
    Capabilities,
    Evaluation,
    Plan,
    Report,
    decode_plan,
    encode_reply,
)
from aggregators.methods import LoraMethod
from aggregators.signatures import sign_reply
from aggregators.view import SealedView, View
from fedclient import base_model, data, quantised_base
from fedclient.beside import UnseenChangeError
from fedclient.evaluation import evaluate
from fedclient.keys import KeyFileError, load_or_create, public_hex
from fedclient.local import first_order, full_weights, lora, zeroth_order
from fedclient.local.placement import PlacementError
from fedclient.local.result import TrainingResult
from fedclient.node import NodeSettings

EVALUATION_BATCH = 16

Progress = Callable[[str, int, int, float], None]
TRAINING_ERRORS = (
    lora.AdapterError,
    first_order.TrainingError,
    zeroth_order.ZerothOrderError,
    PlacementError,
    UnseenChangeError,
)


class NodeError(Exception):
    """Why this node cannot do what it was asked; one line that the coordinator records."""


class Worker:
    """Answers the coordinator's questions. ``progress`` hears (node, step, steps, loss)."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress

    def capabilities(self, query: Mapping[str, Any], settings: NodeSettings) -> Capabilities:
        """What this node has and can do, for a run described by the coordinator's query."""
        with base_model.IN_USE, _threads(query["threads"]):
            base = base_model.load(query["base_model"], query["dtype"])
            own = _load_data(query["data"], settings)
            return Capabilities(
                node=settings.name or _name_at(settings.index, query["names"]),
                examples=len(own.train),
                held_out=len(own.held_out),
                rank_limit=settings.rank_limit,
                base_digest=base.digest,
                layout_json=base.layout.to_json(),
                threads=os.cpu_count() or 1,
                memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                device="cuda" if torch.cuda.is_available() else "cpu",
                accelerator_memory_bytes=torch.cuda.get_device_properties(0).total_memory
                if torch.cuda.is_available()
                else None,
                versions={
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": version("transformers"),
                    "peft": version("peft"),
                },
                public_key=public_hex(_key(settings.key)) if settings.key else None,
                part=settings.index if settings.data is None else None,
            )

    def work(self, payload: bytes, settings: NodeSettings) -> bytes:
        """Do what a plan asks for and return the reply's bytes, signed if the node has a key."""
        plan, sealed = decode_plan(payload)
        with base_model.IN_USE, _threads(plan.threads), _scoped_randomness(plan.seed):
            try:
                reply = self._work(plan, sealed, settings)
            except TRAINING_ERRORS as error:
                raise NodeError(str(error)) from None
        return sign_reply(reply, _key(settings.key)) if settings.key else reply

    def _work(self, plan: Plan, sealed: SealedView, settings: NodeSettings) -> bytes:
        base = quantised_base.load(plan.base_model, plan.dtype, plan.base_format)
        if base.digest != plan.base_digest:
            raise NodeError(
                f"base model {plan.base_model}: this node holds {base.digest[:12]}, the run uses"
                f" {plan.base_digest[:12]}; fetch the run's model"
            )
        layout = base.layout
        if layout.fingerprint != plan.layout:
            raise NodeError("the plan is for a model of another layout")
        view = sealed.read(layout)
        own = _load_data(plan.data, settings)
        pad = _pad_id(base.tokenizer)
        evaluation, update = None, None
        result: TrainingResult | None = None
        with _trainer(plan, base, layout, view) as trainer:
            if plan.evaluate or plan.action == "evaluate":
                held_out = _tokens(plan, settings, base, "held_out")
                evaluation = _evaluation(trainer.model, held_out, own.repeats(), pad)
            if plan.action == "train":
                tokens = _tokens(plan, settings, base, "train")
                stream = data.batches(tokens, plan.batch_size, plan.local_steps, plan.seed, pad)
                update, result = trainer.train(stream, self._report_to(plan.node))
        report = Report(
            examples=len(own.train),
            train_loss=result.last_loss if result else None,
            train_loss_first=result.first_loss if result else None,
            train_tokens=result.tokens if result else 0,
            steps=result.steps if result else 0,
            evaluation=evaluation,
            view=view.digest(),
            weights=trainer.weights,
            base_format=plan.base_format,
            residual=result.residual if result else "",
            unchanged=update is not None and norm_of(update) == 0.0,
        )
        return _answer(plan, base.digest, report, update)

    def _report_to(self, node: str) -> Callable[[int, int, float], None] | None:
        if self._progress is None:
            return None
        progress = self._progress
        return lambda step, steps, loss: progress(node, step, steps, loss)


def _trainer(plan: Plan, base: base_model.LoadedModel, layout: Layout, view: View) -> Any:
    """What trains as the plan's method says, on the weights that the view is."""
    if isinstance(plan.method, LoraMethod):
        return lora.trainer(plan, base, layout, view)
    return full_weights.trainer(plan, base, layout, view)


def _evaluation(
    model: Any, tokens: Sequence[data.Tokens], repeats: Sequence[bool], pad: int
) -> Evaluation:
    """The score of all held-out examples, and of those among them that the node does not train on."""
    parts = []
    for repeated in (False, True):
        chosen = [t for t, is_repeat in zip(tokens, repeats, strict=True) if is_repeat == repeated]
        parts.append(evaluate(model, data.eval_batches(chosen, EVALUATION_BATCH, pad)))
    new, old = parts
    return Evaluation(
        loss_sum=new.loss_sum + old.loss_sum,
        tokens=new.tokens + old.tokens,
        correct=new.correct + old.correct,
        examples=new.examples + old.examples,
        new_loss_sum=new.loss_sum,
        new_tokens=new.tokens,
    )


def _answer(plan: Plan, base_digest: str, report: Report, update: Any) -> bytes:
    return encode_reply(
        run=plan.run,
        round=plan.round,
        node=plan.node,
        nonce=plan.nonce,
        layout=plan.layout,
        base_digest=base_digest,
        report=report,
        update=update,
        dtype=plan.wire_dtype,
        train_a=plan.train_a,
    )


def _name_at(index: int | None, names: Sequence[str]) -> str:
    if index is None:
        raise NodeError("this node has no name: start it with --node-config 'name=\"NAME\"'")
    return names[index] if index < len(names) else f"node-{index}"


def _key(path: str) -> Ed25519PrivateKey:
    try:
        return load_or_create(Path(path))
    except KeyFileError as error:
        raise NodeError(str(error)) from None


def _load_data(given: Mapping[str, Any] | None, settings: NodeSettings) -> data.NodeData:
    chosen = dict(given or {})
    index = settings.index
    if settings.data is not None:
        # A device's own file is wholly its own: there is nothing to divide.
        chosen |= {"source": settings.data, "partition": "iid", "nodes": 1, "categories": None}
        chosen["key"] = None
        index = 0
    if not chosen or index is None:
        raise NodeError(
            "this node has no data: give it a file of its own, --node-config 'data=\"FILE\"', or the"
            " number of a part of the scenario's, 'partition-id=N'"
        )
    try:
        specification = data.DataSpec.model_validate(chosen)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise NodeError(f"data.{where}: {problem['msg']}") from None
    return _partition(specification.model_dump_json(), index)


@lru_cache(maxsize=64)
def _partition(specification: str, index: int) -> data.NodeData:
    return data.load_partition(data.DataSpec.model_validate_json(specification), index)


def _tokens(
    plan: Plan, settings: NodeSettings, base: base_model.LoadedModel, part: str
) -> list[Any]:
    own = _load_data(plan.data, settings)
    return data.tokenise(getattr(own, part), base.tokenizer, plan.max_length)


def _pad_id(tokenizer: Any) -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if candidate is not None:
            return int(candidate)
    return 0


class _threads:
    """Compute with a fixed number of threads: the order of sums, so the bits, depend on it."""

    def __init__(self, count: int | None) -> None:
        self._count = count

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        if self._count is not None:
            torch.set_num_threads(self._count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


class _scoped_randomness:
    """Seed torch for dropout and peft's own initialisations, and restore what was there."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._before = torch.get_rng_state()
        torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._before)
