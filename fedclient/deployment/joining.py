"""Joining a server with a token, and what a joined device asks it later.

Nothing secret is said before the server has shown a certificate of the authority that the token names.
The keys are made here, in the device's folder; their public halves are all that leaves it.
"""

from __future__ import annotations

import http.client
import secrets
import ssl
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from fedclient.deployment.settings import NodeFile, NodeFolder, NodeFolderError
from fedclient.resident.server_clock import ServerClock
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
    Token,
    fingerprint_of,
    join_statement,
)
from fedhost.node_signature import public_pem, signed_headers
from fedhost.private_files import make_private_folder, write_private

TIMEOUT_SECONDS = 30.0
ANSWER_BYTES = 1 << 16
# The front door lets two requests a second through, for an address.
BUSY_SECONDS, BUSY_ATTEMPTS = 1.0, 10
# By OpenSSL's codes. A handshake is judged by this device's own clock: no answer was heard yet.
OUT_OF_TIME = {
    9: ("is not valid yet", ""),
    10: ("has expired", ", or if it is right let the server's operator renew the certificate"),
}

Answer = TypeVar("Answer", JoinAnswer, NodeAnswer)


def join(url: str, token_text: str, folder: NodeFolder, own: Mapping[str, Any]) -> NodeFile:
    """Enrol this device and write its configuration. ``own``: settings of the node for Flower.

    May be repeated with the same token if it was cut off; a folder that holds anything else is refused:
    it is closed to others, and the program will keep its own files there. Raises EnrolmentRefused or
    NodeFolderError.
    """
    # Torch comes with it, and the processes that only ask how a node stands must stay small.
    from fedclient.keys import load_or_create, public_hex, sign

    token = Token.parse(token_text.strip())
    server = address_of(url)
    if folder.file.exists():
        raise NodeFolderError(
            f"{folder.path} has joined {folder.read().server} already: leave it, or use --folder"
        )
    if foreign := folder.foreign():
        held = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise NodeFolderError(
            f"{folder.path} holds what is not a device's ({held}): name a new folder with --folder"
        )
    authority = _fetch_authority(server, token)
    make_private_folder(folder.path)
    transport_key = folder.transport_key()
    update_key = load_or_create(folder.update_key_file)
    transport_public, update_public = public_pem(transport_key), public_hex(update_key)
    statement = join_statement(token.secret, transport_public, update_public)
    request = JoinRequest(
        secret=token.secret.hex(),
        transport_key=transport_public,
        update_key=update_public,
        transport_signature=transport_key.sign(statement, ec.ECDSA(hashes.SHA256())).hex(),
        update_signature=sign(update_key, statement).hex(),
    )
    body = request.model_dump_json().encode()
    answer = _read(_ask(server, "POST", JOIN_ROUTE, trusting(authority), body=body), JoinAnswer)
    write_private(folder.authority, authority)
    if not folder.superexec_secret.exists():
        write_private(folder.superexec_secret, secrets.token_bytes(32))
    joined = NodeFile(server, answer.name, answer.application, dict(own))
    folder.write(joined)
    return joined


def inquire(folder: NodeFolder, clock: ServerClock | None = None) -> NodeAnswer:
    """What the server knows of this node. Raises EnrolmentRefused, e.g. when it was revoked.

    ``clock``: is set by the server's.
    """
    return _read(_signed(folder, "GET", NODE_ROUTE, clock or ServerClock()), NodeAnswer)


def leave(folder: NodeFolder) -> list[str]:
    """Tell the server that this node is gone and delete what the program made in its folder, keys
    included; returns the names of what else lies there, which stays.

    A server that has shut the node out already does not stand in the way; one that cannot be reached
    does, for it would wait for this node. Raises EnrolmentRefused (unreachable).
    """
    try:
        _signed(folder, "POST", LEAVE_ROUTE, ServerClock())
    except EnrolmentRefused as refusal:
        if refusal.kind not in ("revoked", "unknown-node"):
            raise
    return folder.delete()


def address_of(url: str) -> str:
    """``host:port`` of a server's URL. Raises NodeFolderError."""
    parts = urlsplit(url)
    try:
        port = parts.port or 443
    except ValueError:
        port = 0
    if parts.scheme != "https" or not parts.hostname or not port or parts.path.strip("/"):
        raise NodeFolderError(f"{url!r}: write https://HOST:PORT, as 'server invite' printed it")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{port}"


def trusting(authority: bytes) -> ssl.SSLContext:
    """TLS 1.3 with a server whose certificate this authority signed, for its name; nobody else's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority.decode("ascii"))
    return context


def _fetch_authority(server: str, token: Token) -> bytes:
    """The authority's certificate: from anybody, for the token's fingerprint says whether it is it."""
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.minimum_version = ssl.TLSVersion.TLSv1_3
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    headers = {"Authorization": f"Bearer {token.locator}"}
    try:
        found = _ask(server, "GET", AUTHORITY_ROUTE, anybody, headers)
    except EnrolmentRefused as refusal:
        if refusal.kind == "bad-signature":
            raise EnrolmentRefused(
                "unknown-token", "the server does not know this token, or it has expired: ask anew"
            ) from None
        raise
    try:
        genuine = fingerprint_of(found) == token.fingerprint
    except ValueError:
        genuine = False
    if not genuine:
        raise EnrolmentRefused(
            "wrong-authority",
            f"{server} is not the server that made this token: somebody may be in between",
        )
    return found


def _signed(folder: NodeFolder, method: str, route: str, clock: ServerClock) -> bytes:
    """A signed request; made again by the server's time where it refuses this device's."""
    server, tls = folder.read().server, trusting(folder.authority.read_bytes())

    def once() -> bytes:
        headers = signed_headers(folder.transport_key(), clock.now())
        return _ask(server, method, route, tls, headers, clock=clock)

    try:
        return once()
    except EnrolmentRefused as refusal:
        if refusal.kind != "stale":
            raise
        return once()


def _ask(
    server: str,
    method: str,
    route: str,
    context: ssl.SSLContext,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    clock: ServerClock | None = None,
) -> bytes:
    """One request; its answer's bytes. Raises EnrolmentRefused for everything but success.

    A front door that is busy has not looked at the request, so it is asked again. ``clock``: hears what
    time it is there.
    """
    for _ in range(BUSY_ATTEMPTS):
        status, content, date = _once(server, method, route, context, headers, body)
        if status != HTTPStatus.SERVICE_UNAVAILABLE:
            break
        time.sleep(BUSY_SECONDS)
    if clock is not None:
        clock.hear(date)
    if status < 300:
        return content
    try:
        told = RefusalAnswer.model_validate_json(content)
    except ValidationError:
        if status in (401, 403):
            raise EnrolmentRefused("bad-signature", f"{server} refuses ({status})") from None
        raise EnrolmentRefused("unreachable", f"{server} answers {status}: try again") from None
    raise EnrolmentRefused(told.kind, told.text)


def _once(
    server: str,
    method: str,
    route: str,
    context: ssl.SSLContext,
    headers: Mapping[str, str] | None,
    body: bytes | None,
) -> tuple[int, bytes, str | None]:
    """Status, body and Date of one answer. Raises EnrolmentRefused where there is none."""
    connection = http.client.HTTPSConnection(server, timeout=TIMEOUT_SECONDS, context=context)
    try:
        connection.request(method, route, body, dict(headers or {}))
        answer = connection.getresponse()
        found = answer.status, answer.read(ANSWER_BYTES), answer.getheader("Date")
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in OUT_OF_TIME:
            problem, else_ = OUT_OF_TIME[error.verify_code]
            raise EnrolmentRefused(
                "wrong-clock",
                f"the certificate of {server} {problem}, and this device's clock says"
                f" {datetime.now(UTC):%Y-%m-%d %H:%M} UTC: set it{else_}",
            ) from None
        raise EnrolmentRefused(
            "wrong-authority",
            f"{server} shows a certificate that its authority did not sign for it:"
            f" {error.verify_message}",
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise EnrolmentRefused("unreachable", f"{server} does not answer: {error}") from None
    finally:
        connection.close()
    return found


def _read(content: bytes, kind: type[Answer]) -> Answer:
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        raise EnrolmentRefused("unreachable", "the answer is not a fedbraid server's") from None
