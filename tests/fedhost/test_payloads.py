"""Payloads as records: what goes in comes out, and what is not whole does not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedhost.payloads import PART_BYTES, RECORD, from_records, to_records

SIZES = st.sampled_from(
    [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 3 * PART_BYTES + 7]
)


@given(SIZES, st.binary(min_size=1, max_size=8))
def test_a_payload_comes_out_as_it_went_in(size: int, pattern: bytes) -> None:
    payload = (pattern * (size // len(pattern) + 1))[:size]
    records = to_records(payload, {"seconds": 1.5})
    assert from_records(records) == payload
    assert records[RECORD]["seconds"] == 1.5
    # Objects are what costs: a small payload stays one, and no part is the same object as another.
    expected = 1 if size <= PART_BYTES else 1 + -(-size // PART_BYTES)
    assert len({record.object_id for record in records.values()}) == len(records) == expected


@given(st.data())
def test_what_is_not_whole_is_none(data: st.DataObject) -> None:
    records = to_records(bytes(3 * PART_BYTES))
    name = data.draw(st.sampled_from([name for name in records if name != RECORD]))
    match data.draw(st.sampled_from(["missing", "changed", "foreign", "count"])):
        case "missing":
            del records[name]
        case "changed":
            records[name]["part"] = b"\1" + bytes(PART_BYTES - 1)
        case "foreign":
            records[name]["part"] = 3
        case "count":
            records[RECORD]["parts"] = data.draw(st.integers(-1, 2) | st.just(10**9))
    assert from_records(records) is None
