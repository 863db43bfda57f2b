"""Fake nodes: they say over the network all that a SuperNode says, and train nothing.

Many nodes share one process and a few kept connections. Each looks for messages as seldom as an idle
SuperNode of ours does (``fedclient.resident.supernode``), fetches a message object by object, answers
with a canned update that is signed and valid, and sends it object by object.
"""

from __future__ import annotations

import heapq
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from aggregators import Layout, SeedScalars
from aggregators.keys import public_hex
from aggregators.messages import Capabilities, Report, decode_plan, encode_reply
from aggregators.methods import ZerothOrderMethod
from aggregators.signatures import sign_reply
from fedclient.resident.supernode import GROWTH, LONGEST, SHORTEST
from fedhost.node_signature import public_pem, signed_headers
from fedhost.payloads import from_records, to_records
from simulations.benchmarks.edge.server import Door, Server

LAYOUT = Layout({"model.layers.0.self_attn.q_proj.weight": (64, 64)})
BASE_DIGEST = "b" * 64
HEARTBEAT_SECONDS = 30.0
EXAMPLES, USED_SEEDS = 100, 64


@dataclass
class FakeNode:
    """One node between two requests. ``due``: when it looks for a message next."""

    name: str
    transport: ec.EllipticCurvePrivateKey
    signing: Ed25519PrivateKey
    node_id: int = 0
    wait: float = SHORTEST
    beat: float = 0.0


@dataclass
class Traffic:
    """What all nodes asked for together: requests by route, and bytes of bodies both ways."""

    requests: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    received: int = 0
    busy: int = 0


class Fleet:
    """Nodes that answer until they are told to stop; ``connections`` at once."""

    def __init__(self, server: Server, nodes: list[FakeNode], connections: int) -> None:
        self._server = server
        self._tls = server.tls()
        self._queue = [(0.0, place) for place in range(len(nodes))]
        self._nodes = nodes
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(connections)
        ]
        self.traffic = Traffic()
        self.failures: list[str] = []

    def start(self) -> None:
        """Begin; returns when every node is known to Flower as connected."""
        for thread in self._threads:
            thread.start()
        while any(node.node_id == 0 for node in self._nodes) and not self.failures:
            time.sleep(0.2)

    def stop(self) -> None:
        """End after what is under way."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        door = Door(self._server, self._tls)
        while not self._stopped.is_set():
            with self._lock:
                due, place = self._queue[0] if self._queue else (float("inf"), 0)
                if due <= time.monotonic():
                    heapq.heappop(self._queue)
            if due > time.monotonic():
                self._stopped.wait(0.01)
                continue
            node = self._nodes[place]
            try:
                self._visit(door, node)
            except Exception as error:
                self.failures.append(f"{node.name}: {type(error).__name__}: {error}")
                node.wait = LONGEST
            with self._lock:
                heapq.heappush(self._queue, (time.monotonic() + node.wait, place))
        door.close()

    def _visit(self, door: Door, node: FakeNode) -> None:
        if node.node_id == 0:
            asked = fleet_pb2.ActivateNodeRequest(
                public_key=_public(node), heartbeat_interval=HEARTBEAT_SECONDS
            )
            answer = self._ask(door, node, "activate-node", asked, fleet_pb2.ActivateNodeResponse)
            node.node_id, node.beat = answer.node_id, time.monotonic()
        own = Node(node_id=node.node_id)
        if time.monotonic() - node.beat > HEARTBEAT_SECONDS / 2:
            node.beat = time.monotonic()
            beat = heartbeat_pb2.SendNodeHeartbeatRequest(
                node=own, heartbeat_interval=HEARTBEAT_SECONDS
            )
            kind = heartbeat_pb2.SendNodeHeartbeatResponse
            self._ask(door, node, "send-node-heartbeat", beat, kind)
        pull = fleet_pb2.PullMessagesRequest(node=own)
        found = self._ask(door, node, "pull-messages", pull, fleet_pb2.PullMessagesResponse)
        if not found.messages_list:
            node.wait = min(node.wait * GROWTH, LONGEST)
            return
        node.wait = SHORTEST
        message = message_from_proto(found.messages_list[0])
        self._answer(door, node, message, found.message_object_trees[0])

    def _answer(self, door: Door, node: FakeNode, message: Message, tree: Any) -> None:
        own, run_id = Node(node_id=node.node_id), message.metadata.run_id
        contents = {}
        for part in iterate_object_tree(tree):
            pull = message_pb2.PullObjectRequest(node=own, run_id=run_id, object_id=part.object_id)
            got = self._ask(door, node, "pull-object", pull, message_pb2.PullObjectResponse)
            if not (got.object_found and got.object_available):
                return  # It is looked for again with the next message.
            contents[part.object_id] = got.object_content
        confirm = message_pb2.ConfirmMessageReceivedRequest(
            node=own, run_id=run_id, message_object_id=message.metadata.message_id
        )
        kind = message_pb2.ConfirmMessageReceivedResponse
        self._ask(door, node, "confirm-message-received", confirm, kind)
        whole: Any = inflate_object_from_contents(tree.object_id, contents)
        content = to_records(answer(node, whole), {"seconds": 0.0})
        whole.metadata.__dict__["_message_id"] = tree.object_id
        reply = Message(content, reply_to=whole)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        push = fleet_pb2.PushMessagesRequest(
            node=own,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[0.0],
        )
        taken = self._ask(door, node, "push-messages", push, fleet_pb2.PushMessagesResponse)
        objects = get_all_nested_objects(reply)
        for object_id in taken.objects_to_push:
            content = message_pb2.PushObjectRequest(
                node=own, run_id=run_id, object_id=object_id, session_id=taken.session_id,
                object_content=objects[object_id].deflate(),
            )  # fmt: skip
            self._ask(door, node, "push-object", content, message_pb2.PushObjectResponse)

    def _ask(self, door: Door, node: FakeNode, route: str, asked: Any, kind: type) -> Any:
        """One request, put again while the server is busy, as a SuperNode does."""
        body = asked.SerializeToString()
        pause = 0.5
        while True:
            headers = {
                "Content-Type": PROTOBUF_MEDIA_TYPE,
                **signed_headers(node.transport, datetime.now(UTC)),
            }
            status, content = door.ask("POST", f"/v1/fleet/{route}", headers, body)
            with self._lock:
                self.traffic.requests[route] += 1
                self.traffic.sent += len(body)
                self.traffic.received += len(content)
                self.traffic.busy += status in (502, 503, 504)
            if status == 200:
                answer = kind()
                answer.ParseFromString(content)
                return answer
            if status not in (502, 503, 504) or self._stopped.is_set():
                raise RuntimeError(f"{route}: {status} {content[:120]!r}")
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


def answer(node: FakeNode, message: Message) -> bytes:
    """What a node says: who it is, or an update as if it had trained."""
    payload: Any = from_records(message.content)
    if message.metadata.message_type == "query":
        json.loads(payload)
        return Capabilities(
            node=node.name,
            examples=EXAMPLES,
            held_out=1,
            rank_limit=8,
            base_digest=BASE_DIGEST,
            layout_json=LAYOUT.to_json(),
            threads=1,
            memory_bytes=1 << 30,
            device="cpu",
            versions={},
            public_key=public_hex(node.signing),
        ).to_bytes()
    plan, sealed = decode_plan(payload)
    method = plan.method
    assert isinstance(method, ZerothOrderMethod)
    used = range(plan.seed % 16, method.pool_size, method.pool_size // USED_SEEDS)
    scalars = [1e-5 * (1 + index % 7) for index in used]
    reply = encode_reply(
        run=plan.run,
        round=plan.round,
        node=plan.node,
        nonce=plan.nonce,
        layout=plan.layout,
        base_digest=BASE_DIGEST,
        report=Report(examples=EXAMPLES, train_loss=1.0, view=sealed.read(LAYOUT).digest()),
        update=SeedScalars(
            LAYOUT, method.master_seed, method.pool_size, used, scalars, method.probe
        ),
        dtype=plan.wire_dtype,
    )
    return sign_reply(reply, node.signing)


def _public(node: FakeNode) -> bytes:
    return public_pem(node.transport).encode()
