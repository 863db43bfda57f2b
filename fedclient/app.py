"""The Flower ClientApp: a thin stub, bytes in and bytes out.

Flower starts a process for every message. With ``worker="SOCKET"`` in the node's configuration that
process only hands the bytes to the resident worker, and imports neither torch nor transformers. Without
it, the process does the work itself: right for Flower's simulation, slow in a deployment.
"""

from __future__ import annotations

import time
from functools import lru_cache, partial

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedclient.node import Answer, Kind, NodeSettings, Refused
from fedhost.payloads import RECORD, Value, from_records, to_records


def make_app(answer: Answer) -> ClientApp:
    """A ClientApp that answers query, train and evaluate messages by ``answer``."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _reply(message, context, "query", answer)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _reply(message, context, "train", answer)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _reply(message, context, "evaluate", answer)

    return app


def settings_of(context: Context) -> NodeSettings:
    """A node's settings from its Flower node configuration."""
    own = context.node_config
    name, source, key, worker = (own.get(part) for part in ("name", "data", "key", "worker"))
    index = own.get("partition-id")
    return NodeSettings(
        index=int(index) if index is not None else None,
        name=str(name) if name is not None else None,
        data=str(source) if source is not None else None,
        rank_limit=int(own.get("rank-limit", NodeSettings.rank_limit)),
        key=str(key) if key is not None else None,
        worker=str(worker) if worker is not None else None,
    )


def _reply(message: Message, context: Context, kind: Kind, answer: Answer) -> Message:
    settings = settings_of(context)
    started = time.monotonic()
    reply: bytes | None = None
    beside: dict[str, Value] = {}
    try:
        payload = from_records(message.content)
        assert payload is not None
        ask = _ask_worker if settings.worker is not None else partial(_measured, answer)
        # Beside the payload, so that the bytes that are hashed hold nothing of the machine.
        reply, beside["memory"] = ask(kind, payload, settings)
    except Refused as refusal:
        # Expected failures travel as one line; anything else is a bug and Flower reports it.
        beside = {"error": str(refusal), "reason": refusal.reason}
    # Nor do they hold a clock.
    beside["seconds"] = time.monotonic() - started
    if reply is None:
        return Message(RecordDict({RECORD: ConfigRecord(dict(beside))}), reply_to=message)
    return Message(to_records(reply, beside), reply_to=message)


def _measured(
    answer: Answer, kind: Kind, payload: bytes, settings: NodeSettings
) -> tuple[bytes, list[int]]:
    """The answer of this process, and the memory that it took (as ``fedclient.memory`` counts)."""
    from fedclient.memory import PeakMemory

    memory = PeakMemory()
    answered = answer(kind, payload, settings)
    return answered, memory.read().told()


def _ask_worker(kind: Kind, payload: bytes, settings: NodeSettings) -> tuple[bytes, list[int]]:
    from fedclient.resident.connection import Connection

    assert settings.worker is not None
    with Connection(settings.worker) as connection:
        answered = connection.answer(kind, payload, settings)
    return answered.payload, answered.header["memory"]


def _answer(kind: Kind, payload: bytes, settings: NodeSettings) -> bytes:
    return _in_this_process()(kind, payload, settings)


@lru_cache(maxsize=1)
def _in_this_process() -> Answer:
    from fedclient.answers import answers_of
    from fedclient.worker import Worker

    return answers_of(Worker())


app = make_app(_answer)
