"""Misbehaving nodes for simulations: each fault is something that a real node has been seen to do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from flwr.app import Context, Error, Message, MessageType

from aggregators.codec import pack, unpack
from aggregators.signatures import join_signature, split_signature
from fedhost.payloads import from_records, to_records
from simulations.local_grid import Answer, Delivery

PROCESS_DIED = 8  # Flower's error code for a ClientApp process that was killed.

Header = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def faulty(fault: str, answer: Answer, deadline_seconds: float) -> Answer:
    """Wrap a node so that it misbehaves in every training message and is honest otherwise."""

    def misbehave(message: Message, context: Context) -> list[Delivery]:
        if message.metadata.message_type != MessageType.TRAIN or fault == "":
            return answer(message, context)
        if fault == "never":
            return []
        if fault == "crash":
            return [Delivery(Message(Error(PROCESS_DIED, "killed"), reply_to=message))]
        deliveries = answer(message, context)
        if fault == "twice":
            return deliveries * 2
        if fault == "late":
            return [Delivery(d.reply, deadline_seconds + 1.0) for d in deliveries]
        return [_tampered(d, _CHANGES[fault], message) for d in deliveries]

    return misbehave


def away(rounds: Collection[int], answer: Answer) -> Answer:
    """Wrap a node so that it is silent in some rounds: it joins late, or comes and goes."""
    silent = {str(number) for number in rounds}

    def come_and_go(message: Message, context: Context) -> list[Delivery]:
        trains = message.metadata.message_type == MessageType.TRAIN
        return [] if trains and message.metadata.group_id in silent else answer(message, context)

    return come_and_go


def _tampered(
    delivery: Delivery, change: Callable[[Header, Tensors], None], asked: Message
) -> Delivery:
    payload = from_records(delivery.reply.content)
    assert payload is not None
    reply, signature = split_signature(payload)
    header, tensors = unpack(reply)
    change(header, tensors)
    # The signature stays that of what the node meant to send.
    tampered = join_signature(pack(header, tensors), signature)
    forged = Message(to_records(tampered, {"seconds": 0.0}), reply_to=asked)
    return Delivery(forged, delivery.after)


def _in_body(change: Callable[[Header, Tensors], None]) -> Callable[[Header, Tensors], None]:
    """Change the update inside a reply and make the envelope's digest fit: a forger would."""

    def apply(header: Header, tensors: Tensors) -> None:
        inner_header, inner = unpack(tensors["body"].numpy().tobytes())
        change(inner_header, inner)
        body = pack(inner_header, inner)
        tensors["body"] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        header["envelope"]["payload_digest"] = hashlib.sha256(body).hexdigest()

    return apply


def _nan(header: Header, tensors: Tensors) -> None:
    name = _numbers(tensors)
    kind = tensors[name].dtype
    if not kind.is_floating_point or "largest" in header | tensors:
        # Numbers relative to a unit would need one that JSON cannot write: these are absolute.
        kind = torch.float32
        header.pop("largest", None)
        tensors.pop("largest", None)
    tensors[name] = torch.full_like(tensors[name], float("nan"), dtype=kind)


def _wrong_shape(header: Header, tensors: Tensors) -> None:
    name = _numbers(tensors)
    tensors[name] = tensors[name][:-1]


def _numbers(tensors: Tensors) -> str:
    """A tensor that holds an update's numbers: a factor B, or all of what is no stack of factors."""
    return next(n for n in sorted(tensors) if n.endswith("#B") or n == "numbers")


def _other_layout(header: Header, tensors: Tensors) -> None:
    header["envelope"]["layout"] = hashlib.sha256(b"another model").hexdigest()


_CHANGES: dict[str, Callable[[Header, Tensors], None]] = {
    "nan": _in_body(_nan),
    "shape": _in_body(_wrong_shape),
    "layout": _other_layout,
}
