"""One question to the worker: the bytes of a message, and the node's settings that go with them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, get_args

from fedclient.node import Kind, NodeSettings
from fedclient.resident.frames import Frame, FrameError

# Of a question without a plan, as a query is.
QUERY_SECONDS = 900.0
PLAN_HEADER_LIMIT = 16 << 20
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Question:
    """What a node is asked, and as whom."""

    kind: Kind
    payload: bytes
    settings: NodeSettings

    def to_frame(self) -> Frame:
        """As a message to the worker; where its socket is stays with the asker."""
        settings = {k: v for k, v in asdict(self.settings).items() if k != "worker"}
        return Frame({"kind": self.kind, "settings": settings}, self.payload)

    @classmethod
    def from_frame(cls, frame: Frame) -> Question:
        """Invert ``to_frame``. Raises FrameError for anything else."""
        settings = frame.header.get("settings")
        kind = next((kind for kind in KINDS if kind == frame.header.get("kind")), None)
        if kind is None or not isinstance(settings, dict):
            raise FrameError("no question")
        try:
            return cls(kind, frame.payload, NodeSettings(**settings))
        except TypeError as error:
            raise FrameError(str(error)) from None

    @property
    def identity(self) -> str:
        """SHA-256 of the question; its plan's nonce is among the bytes, and so is the model's view."""
        frame = self.to_frame()
        header = json.dumps(frame.header, sort_keys=True).encode()
        return hashlib.sha256(hashlib.sha256(header).digest() + self.payload).hexdigest()

    @property
    def lasting(self) -> bool:
        """Whether its answer may be given again: a plan has one answer, a query is of the moment."""
        return self.kind != "query"

    @property
    def plan(self) -> dict[str, Any]:
        """The plan's fields, read from the payload's header alone; {} where there is none.

        What they say is checked by the worker; here they are a name for people and a deadline.
        """
        size = int.from_bytes(self.payload[:8], "little")
        if not 0 < size <= min(PLAN_HEADER_LIMIT, len(self.payload) - 8):
            return {}
        try:
            outer = json.loads(self.payload[8 : 8 + size])
            found = json.loads(outer["__metadata__"]["fedbraid"])["plan"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def seconds(self) -> float:
        """Wall-clock time that the answer may take."""
        given = self.plan.get("deadline_seconds")
        return float(given) if isinstance(given, (int, float)) and given > 0 else QUERY_SECONDS
