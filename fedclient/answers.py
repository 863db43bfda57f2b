"""A worker's answers as bytes, with its expected failures as ``Refused``."""

from __future__ import annotations

import json

from aggregators import UpdateRejected
from fedclient.base_model import BaseModelError
from fedclient.data import DataError
from fedclient.node import Answer, Kind, NodeSettings, Refused
from fedclient.worker import NodeError, Worker


def answers_of(worker: Worker) -> Answer:
    """What ``worker`` answers to a message. Any exception but ``Refused`` is a defect."""

    def answer(kind: Kind, payload: bytes, settings: NodeSettings) -> bytes:
        try:
            if kind == "query":
                return worker.capabilities(json.loads(payload), settings).to_bytes()
            return worker.work(payload, settings)
        except (BaseModelError, DataError, NodeError, UpdateRejected) as error:
            raise Refused(str(error)) from None

    return answer
