"""What a connection that breaks costs a large update.

    python -m simulations.benchmarks.resumable

A device speaks to a real server (nginx, SuperLink, SuperExec) by Flower's own transport, through a relay
that cuts every connection after so many bytes. Its update travels in parts as always, and once as one
object. Prints the bytes that the device sent against those of the update. Ends with 1 if an update did
not arrive, or if in parts more was sent again than what was under way when the connection broke.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, push_objects
from flwr.supernode.fleet_http_connection import http_request_response
from rich.table import Table

import fedhost.payloads
from aggregators import Layout, LowRank
from aggregators.keys import load, public_hex
from aggregators.messages import Capabilities, Report, decode_plan, encode_reply
from aggregators.signatures import sign_reply
from fedclient.deployment.joining import join
from fedclient.deployment.settings import NodeFolder
from fedhost.payloads import PART_BYTES, from_records, to_records
from fedhost.ports import LOOPBACK
from fedserver.ledger import Ledger
from simulations.benchmarks.edge.server import Server, running_server
from simulations.benchmarks.tables import table_console

MEGABYTE = 1 << 20
NAME, SIDE, BASE_DIGEST = "device", 1024, "b" * 64
LAYOUT = Layout({"model.layers.0.self_attn.q_proj.weight": (SIDE, SIDE)})
SCENARIO = """
name = "{name}"
base_model = "none"
rounds = 1
seed = {seed}
threads = 1
evaluate = false
lora_r = {rank}
wire_dtype = "float32"
max_norm = 1e6
deadline_seconds = 600.0

[[nodes]]
name = "device"
"""


class Relay:
    """Passes TCP on to ``port``, and breaks connections once it is told to."""

    def __init__(self, port: int) -> None:
        self._port, self._cut, self._left = port, 0, 0
        self._lock = threading.Lock()
        self._listening = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listening.getsockname()[1])
        self.sent = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def breaks(self, cut: int, cuts: int) -> None:
        """From now on end a connection over which ``cut`` bytes were sent, so many times."""
        self._cut, self._left, self.sent = cut, cuts, 0

    def close(self) -> None:
        """Take no more connections."""
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection((LOOPBACK, self._port))
                for pump in (self._up, self._down):
                    threading.Thread(target=pump, args=(client, server), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        with suppress(OSError):
            while data := client.recv(1 << 14):
                passed += len(data)
                with self._lock:
                    self.sent += len(data)
                    broken = passed > self._cut and self._left > 0
                    self._left -= broken
                if broken:
                    break
                server.sendall(data)
        _end(client, server)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 14):
                client.sendall(data)
        _end(client, server)


def _end(*sockets: socket.socket) -> None:
    for one in sockets:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


@dataclass(frozen=True)
class Sent:
    """What one update took. ``counted``: it is in the ledger."""

    payload: int
    sent: int
    requests: int
    seconds: float
    counted: bool


def main(
    megabytes: Annotated[float, typer.Option(help="Size of the update.")] = 4.0,
    cut: Annotated[float, typer.Option(help="Megabytes after which a connection breaks.")] = 1.5,
    cuts: Annotated[int, typer.Option(help="How many connections break.")] = 6,
) -> None:
    """Send one update in parts and one whole over connections that break."""
    table = Table("the update travels", "bytes of it", "bytes sent", "sent again", "objects", "")
    found: dict[str, Sent] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with running_server(folder / "server") as server:
            device = NodeFolder(folder / NAME)
            join(server.url, str(server.invite(NAME)), device, {})
            for seed, (name, part) in enumerate((("parts", PART_BYTES), ("whole", 1 << 30))):
                fedhost.payloads.PART_BYTES = part
                found[name] = send(server, device, name, seed, megabytes, (cut, cuts))
    for name, one in found.items():
        table.add_row(
            "in parts" if name == "parts" else "as one object", f"{one.payload:,}",
            f"{one.sent:,}", f"{one.sent / one.payload - 1:+.0%}", str(one.requests),
            "counted" if one.counted else "[red]LOST[/red]",
        )  # fmt: skip
    table_console().print(table)
    parts = found["parts"]
    # Of each broken connection at most the parts under way, one a thread, and the headers of requests.
    bound = parts.payload + cuts * 2 * PART_BYTES + 65536 * (cuts + 1)
    sound = all(one.counted for one in found.values()) and parts.sent <= bound
    raise typer.Exit(0 if sound else 1)


def send(
    server: Server, device: NodeFolder, name: str, seed: int, megabytes: float,
    broken: tuple[float, int],
) -> Sent:  # fmt: skip
    """One run of one round, whose one update goes through a relay that breaks connections."""
    rank = max(1, round(megabytes * MEGABYTE / (2 * SIDE * 4)))
    scenario = server.folder.path / f"{name}.toml"
    scenario.write_text(SCENARIO.format(name=name, seed=seed, rank=rank))
    command = [sys.executable, "-m", "simulations.command", "server", "run"]
    run = subprocess.Popen(
        [*command, str(server.folder.path), str(scenario)], stdout=subprocess.PIPE, text=True
    )
    key = device.transport_key()
    authority = server.folder.identity(server.settings).authority.read_bytes()
    relay = Relay(server.settings.port)
    started = time.monotonic()
    found = (0, 0, 0)
    with http_request_response(
        f"{LOOPBACK}:{relay.port}", False, authority, (key, key.public_key())
    ) as (_, receive, push, _, _, pull, push_object, confirm):
        while run.poll() is None:
            got = receive()
            if got is None:
                time.sleep(0.2)
                continue
            message, tree = got
            contents = {
                one.object_id: pull(message.metadata.run_id, one.object_id)
                for one in iterate_object_tree(tree)
            }
            confirm(message.metadata.run_id, message.metadata.message_id)
            asked: Any = inflate_object_from_contents(tree.object_id, contents)
            asked.metadata.__dict__["_message_id"] = tree.object_id
            payload = _answer(asked, load(device.update_key_file))
            reply = Message(to_records(payload, {"seconds": 0.0}), reply_to=asked)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            if asked.metadata.message_type != "query":
                relay.breaks(int(broken[0] * MEGABYTE), broken[1])
            wanted, session = push(remove_content_from_message(reply), get_object_tree(reply), 0.0)
            run_id = asked.metadata.run_id
            push_objects(objects, partial(push_object, run_id, session), object_ids_to_push=wanted)
            if asked.metadata.message_type != "query":
                found = (len(payload), relay.sent, len(wanted))
    relay.close()
    return Sent(*found, time.monotonic() - started, _counted(server.folder.runs / name))


def _answer(message: Message, key: Ed25519PrivateKey) -> bytes:
    payload: Any = from_records(message.content)
    if message.metadata.message_type == "query":
        return Capabilities(
            node=NAME, examples=10, held_out=1, rank_limit=SIDE, base_digest=BASE_DIGEST,
            layout_json=LAYOUT.to_json(), threads=1, memory_bytes=1 << 30, device="cpu",
            versions={}, public_key=public_hex(key),
        ).to_bytes()  # fmt: skip
    plan, _ = decode_plan(payload)
    generator = torch.Generator().manual_seed(plan.seed % 2**31)
    rank = plan.lora.rank
    b, a = (torch.randn(SIDE, rank, generator=generator) for _ in range(2))
    factors = {LAYOUT.tensors[0].name: (b, a.T.contiguous(), 1e-3)}
    reply = encode_reply(
        run=plan.run, round=plan.round, node=plan.node, nonce=plan.nonce, layout=plan.layout,
        base_digest=BASE_DIGEST, report=Report(examples=10, train_loss=1.0),
        update=LowRank(LAYOUT, factors), dtype=plan.wire_dtype,
    )  # fmt: skip
    return sign_reply(reply, key)


def _counted(run: Path) -> bool:
    ledger = Ledger(run)
    try:
        entry = ledger.last("round")
        return entry is not None and entry.content["nodes"][0]["verdict"] == "accepted"
    finally:
        ledger.close()


if __name__ == "__main__":
    typer.run(main)
