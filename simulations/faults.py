"""Misbehaving nodes for simulations: each fault is something that a real node has been seen to do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from aggregators.codec import pack, unpack
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict

from simulations.local_grid import Answer, Delivery

RECORD = "fedbraid"
PROCESS_DIED = 8  # Flower's error code for a ClientApp process that was killed.

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


def _tampered(
    delivery: Delivery, change: Callable[[dict[str, object], Tensors], None], asked: Message
) -> Delivery:
    record = delivery.reply.content[RECORD]
    payload = record["payload"]
    assert isinstance(payload, bytes)
    header, tensors = unpack(payload)
    change(header, tensors)
    forged = ConfigRecord({**record, "payload": pack(header, tensors)})
    return Delivery(Message(RecordDict({RECORD: forged}), reply_to=asked), delivery.after)
