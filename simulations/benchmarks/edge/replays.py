"""What was said once does not count again: a node's signed request, and a token."""

from __future__ import annotations

import json
import time
from collections import Counter

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedhost.enrolment import JOIN_ROUTE, JoinRequest, Token, join_statement
from fedhost.node_signature import public_pem
from fedserver.deployment.front_door import NODE_RATE
from simulations.benchmarks.edge.server import PULL, Device, Door, Server


def replay_request(server: Server, device: Device, count: int) -> Counter[int]:
    """Make one signed request, then ``count`` times the same; the replays' statuses.

    Slowly enough for every replay to be judged by its signature: faster ones meet the rate limit.
    """
    door = Door(server)
    headers, body = device.headers(), device.pull()
    status, _ = door.ask("POST", PULL, headers, body)
    assert status == 200, status
    found: Counter[int] = Counter()
    for _ in range(count):
        started = time.monotonic()
        status, _ = door.ask("POST", PULL, headers, body)
        found[status] += 1
        time.sleep(max(0.0, 1.0 / NODE_RATE - (time.monotonic() - started)))
    door.close()
    return found


def replay_token(server: Server, token: Token, count: int) -> Counter[str]:
    """Try a used token from ``count`` other devices; the refusals' kinds, or nginx's status."""
    door = Door(server)
    found: Counter[str] = Counter()
    for _ in range(count):
        transport, update = ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()
        public = public_pem(transport), update.public_key().public_bytes_raw().hex()
        statement = join_statement(token.secret, *public)
        request = JoinRequest(
            secret=token.secret.hex(),
            transport_key=public[0],
            update_key=public[1],
            transport_signature=transport.sign(statement, ec.ECDSA(hashes.SHA256())).hex(),
            update_signature=update.sign(statement).hex(),
        )
        status, content = door.ask("POST", JOIN_ROUTE, {}, request.model_dump_json().encode())
        known = status in (401, 403)
        found[str(json.loads(content)["kind"]) if known else str(status)] += 1
    door.close()
    return found
