"""The Flower ClientApp: a thin shell around the worker, one bytes object in and one out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from aggregators import UpdateRejected
from fedclient.base_model import BaseModelError
from fedclient.data import DataError
from fedclient.memory import PeakMemory
from fedclient.worker import NodeError, NodeSettings, Worker

RECORD = "fedbraid"


def make_app(worker: Worker) -> ClientApp:
    """A ClientApp that answers query, train and evaluate messages through ``worker``."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        def answer(payload: bytes, settings: NodeSettings) -> bytes:
            return worker.capabilities(json.loads(payload), settings).to_bytes()

        return _reply(message, context, answer)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _reply(message, context, worker.work)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _reply(message, context, worker.work)

    return app


def settings_of(context: Context) -> NodeSettings:
    """A node's settings from its Flower node configuration."""
    own = context.node_config
    name, source = own.get("name"), own.get("data")
    return NodeSettings(
        index=int(own.get("partition-id", 0)),
        name=str(name) if name is not None else None,
        data=str(source) if source is not None else None,
        rank_limit=int(own.get("rank-limit", NodeSettings.rank_limit)),
    )


def _reply(
    message: Message, context: Context, answer: Callable[[bytes, NodeSettings], bytes]
) -> Message:
    started, memory = time.monotonic(), PeakMemory()
    record = ConfigRecord()
    try:
        payload = message.content[RECORD]["payload"]
        assert isinstance(payload, bytes)
        record["payload"] = answer(payload, settings_of(context))
    except (BaseModelError, DataError, NodeError, UpdateRejected) as error:
        # Expected failures travel as one line; anything else is a bug and Flower reports it.
        record["error"] = str(error)
    # Beside the payload, so that the bytes that are hashed hold no clock, and nothing of the machine.
    record["seconds"] = time.monotonic() - started
    peak = memory.read()
    record["memory"] = [peak.grown, peak.most, peak.accelerator]
    return Message(RecordDict({RECORD: record}), reply_to=message)


app = make_app(Worker())
