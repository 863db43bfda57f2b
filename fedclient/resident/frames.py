"""Frames: a small JSON header and bytes, the form of every message of the resident worker.

In a gRPC message a frame is the whole message; on the socket to the model's process it follows its
length. No value in either is ever executed or unpickled.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, NamedTuple

_LENGTH = struct.Struct("<Q")
HEADER_LIMIT = 1 << 20


class Frame(NamedTuple):
    """``header`` is JSON, ``payload`` anything."""

    header: dict[str, Any]
    payload: bytes = b""


class FrameError(Exception):
    """Bytes that are no frame."""


def to_bytes(frame: Frame) -> bytes:
    """Length of the header, the header, the payload."""
    header = json.dumps(frame.header, separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(header)), header, frame.payload))


def from_bytes(data: bytes) -> Frame:
    """Invert ``to_bytes``. Raises FrameError for anything else."""
    if len(data) < _LENGTH.size:
        raise FrameError(f"{len(data)} bytes are too few")
    (size,) = _LENGTH.unpack_from(data)
    end = _LENGTH.size + size
    if size > HEADER_LIMIT or end > len(data):
        raise FrameError(f"a header of {size} bytes")
    try:
        header = json.loads(data[_LENGTH.size : end])
    except (ValueError, RecursionError) as error:
        raise FrameError(str(error)) from None
    if not isinstance(header, dict):
        raise FrameError("the header is not a JSON object")
    return Frame(header, data[end:])


def send(connection: socket.socket, frame: Frame) -> None:
    """Write one frame to a stream socket."""
    data = to_bytes(frame)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> Frame:
    """Read one frame from a stream socket. Raises EOFError when the other side is gone."""
    (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return from_bytes(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = connection.recv_into(view[done:])
        if count == 0:
            raise EOFError
        done += count
    return bytes(data)
