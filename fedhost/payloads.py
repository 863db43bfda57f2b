"""A message's bytes as Flower's records: one object while they are few, parts of their own when many.

Flower sends every object of a message by a request of its own, and after a broken connection that
request alone again. So a large payload in parts goes on where it stopped, and is sent from the beginning
if it is one object. Each object costs the SuperLink a request, so small payloads stay whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from flwr.app import ConfigRecord, RecordDict

RECORD = "fedbraid"
# About half a minute of a link of 64 kbit/s; a request more for every four seconds of 0.5 Mbit/s.
PART_BYTES = 1 << 18
PAYLOAD, PARTS, DIGEST, PART, PLACE = "payload", "parts", "sha256", "part", "place"

Value = str | int | float | list[int]


def to_records(payload: bytes, beside: Mapping[str, Value] | None = None) -> RecordDict:
    """A payload, and small values beside it, as the content of a message."""
    main = ConfigRecord(dict(beside or {}))
    records = RecordDict({RECORD: main})
    if len(payload) <= PART_BYTES:
        main[PAYLOAD] = payload
        return records
    parts = [payload[at : at + PART_BYTES] for at in range(0, len(payload), PART_BYTES)]
    main[PARTS], main[DIGEST] = len(parts), hashlib.sha256(payload).hexdigest()
    for place, part in enumerate(parts):
        # With its place no two parts are one object, whatever they hold.
        records[_name(place)] = ConfigRecord({PART: part, PLACE: place})
    return records


def from_records(records: RecordDict) -> bytes | None:
    """The payload in a message's content; None where it is not whole, or none."""
    main = records.get(RECORD)
    if not isinstance(main, ConfigRecord):
        return None
    whole = main.get(PAYLOAD)
    if isinstance(whole, bytes):
        return whole
    count, found = main.get(PARTS), []
    if type(count) is not int or not 0 < count < len(records):
        return None
    for place in range(count):
        record = records.get(_name(place))
        part = record.get(PART) if isinstance(record, ConfigRecord) else None
        if not isinstance(part, bytes):
            return None
        found.append(part)
    payload = b"".join(found)
    return payload if hashlib.sha256(payload).hexdigest() == main.get(DIGEST) else None


def _name(place: int) -> str:
    return f"{RECORD}.{place:05d}"
