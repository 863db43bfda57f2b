"""The service behind the front door: is this sender a node, and may this device join?

It runs on loopback, and nginx is its only client: ``/check`` answers nginx's question before a body is
read; the enrolment routes are nginx's ``/enrol/``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from fedhost.enrolment import (
    AUTHORITY_ROUTE,
    JOIN_ROUTE,
    LEAVE_ROUTE,
    NODE_ROUTE,
    EnrolmentRefused,
    JoinAnswer,
    JoinRequest,
    NodeAnswer,
    RefusalAnswer,
)
from fedhost.node_signature import read_signed, verify
from fedserver.deployment.application import bundle_hash
from fedserver.deployment.flower_control import DeploymentError, FlowerControl
from fedserver.deployment.registry import Node, Registry

# A whole body must be there within this time, however it trickles in; nginx bounds its size.
BODY_SECONDS = 10.0
UNAUTHENTICATED = {"bad-signature", "stale", "unknown-node", "replayed", "bad-request"}

log = logging.getLogger("fedbraid.gatekeeper")


class Gatekeeper:
    """Answers for a registry. ``authority``: PEM of what devices pin; ``serves``: is Flower there?"""

    def __init__(
        self,
        registry: Registry,
        control: FlowerControl,
        authority: bytes,
        serves: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._control = control
        self._authority = authority
        self._serves = serves
        # Flower's list follows the registry; two at once would register a node twice.
        self._following = asyncio.Lock()

    def application(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/check", self.check),
                Route("/ready", self.ready),
                Route(AUTHORITY_ROUTE, self.authority),
                Route(JOIN_ROUTE, self.join, methods=["POST"]),
                Route(NODE_ROUTE, self.node),
                Route(LEAVE_ROUTE, self.leave, methods=["POST"]),
            ],
            exception_handlers={EnrolmentRefused: _refuse, DeploymentError: _unavailable},
        )

    async def check(self, request: Request) -> Response:
        """204 for a node's request that was not made before; 401 otherwise.

        Revoked nodes get 401, too: a SuperNode ends at that, while it would poll on for ever at 403.
        """
        try:
            self._sender(request)
        except EnrolmentRefused as refusal:
            log.warning("refused: %s: %s", refusal.kind, refusal)
            return Response(status_code=401)
        return Response(status_code=204)

    async def ready(self, request: Request) -> Response:
        """200 when Flower answers as well."""
        ready = await run_in_threadpool(self._serves)
        return Response("ready\n" if ready else "Flower does not answer\n", 200 if ready else 503)

    async def authority(self, request: Request) -> Response:
        """The authority's certificate, for who holds an invitation."""
        scheme, _, locator = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not self._registry.is_invited(locator, time.time()):
            return Response(status_code=401)
        return Response(self._authority, media_type="application/x-pem-file")

    async def join(self, request: Request) -> Response:
        """Enrol a device: check its token and that it holds its keys, then tell Flower."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                asked = JoinRequest.model_validate_json(await request.body())
            check_keys(asked)
        except (ValidationError, TimeoutError, ClientDisconnect):
            raise EnrolmentRefused("bad-request", "this is not a request to join") from None
        node = await run_in_threadpool(self._registry.redeem, asked, time.time())
        ids = await self.follow()
        log.warning("%s has joined", node.name)
        return _json(JoinAnswer(name=node.name, node_id=ids[node.name], application=bundle_hash()))

    async def node(self, request: Request) -> Response:
        """What is known of the node that asks."""
        node = self._sender(request)
        return _json(NodeAnswer(name=node.name, joined=node.joined, application=bundle_hash()))

    async def leave(self, request: Request) -> Response:
        """Shut out the node that asks for it."""
        node = self._sender(request)
        self._registry.revoke(node.name, time.time())
        await self.follow()
        log.warning("%s has left", node.name)
        return Response(status_code=204)

    async def follow(self) -> dict[str, int]:
        """Let Flower's list of nodes follow the registry."""
        async with self._following:
            return await run_in_threadpool(self._control.follow, self._registry)

    def _sender(self, request: Request) -> Node:
        return self._registry.admit(read_signed(request.headers, time.time()))


def check_keys(asked: JoinRequest) -> None:
    """Check that the device holds both keys, and that Flower will take the first.

    Raises EnrolmentRefused: bad-request (not such keys) or bad-signature.
    """
    try:
        key = serialization.load_pem_public_key(asked.transport_key.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        # Flower takes other curves, too; nginx counts by the key, and its counters' keys are short.
        raise EnrolmentRefused("bad-request", "the transport key is not an EC key on P-256")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    if key.public_bytes(serialization.Encoding.PEM, form).decode() != asked.transport_key:
        # Requests are matched by these bytes.
        raise EnrolmentRefused("bad-request", "the transport key is not in the usual PEM form")
    verify(asked.transport_key, asked.statement(), bytes.fromhex(asked.transport_signature))
    try:
        update_key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(asked.update_key))
        update_key.verify(bytes.fromhex(asked.update_signature), asked.statement())
    except (ValueError, InvalidSignature):
        raise EnrolmentRefused("bad-signature", "the signature is not of the update key") from None


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, EnrolmentRefused)
    log.warning("refused: %s: %s", error.kind, error)
    status = 401 if error.kind in UNAUTHENTICATED else 403
    return _json(RefusalAnswer(kind=error.kind, text=str(error)), status)


async def _unavailable(request: Request, error: Exception) -> Response:
    log.error("%s", error)
    return _json(RefusalAnswer(kind="unreachable", text="Flower does not answer: try again"), 503)


def _json(words: BaseModel, status: int = 200) -> Response:
    return Response(words.model_dump_json(), status, media_type="application/json")
