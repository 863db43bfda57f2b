"""Every event is one JSON object, whatever numbers it holds."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedserver import events

KINDS = get_args(events.Event)


@pytest.mark.parametrize("kind", KINDS)
def test_events_are_frozen(kind: type) -> None:
    assert dataclasses.is_dataclass(kind)
    event = object.__new__(kind)
    first = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, first, None)


@given(st.one_of(*(st.from_type(kind) for kind in KINDS)))
def test_events_survive_json(event: events.Event) -> None:
    told = events.to_json(event)
    # Strict JSON has neither NaN nor infinities.
    read = json.loads(json.dumps(told, allow_nan=False))
    assert read == told
    assert read.pop("event").replace("_", "") == type(event).__name__.lower()
    assert set(read) == {field.name for field in dataclasses.fields(event)}


@given(st.one_of(*(st.from_type(kind) for kind in KINDS if kind is not events.RunFinished)))
def test_a_reader_of_the_log_hears_the_same_events(event: events.Event) -> None:
    told = events.to_json(event)
    read = events.from_json(json.loads(json.dumps(told)))
    assert type(read) is type(event)
    assert read is not None
    assert events.to_json(read) == told


@pytest.mark.parametrize("told", [{}, {"event": "later"}, {"event": "notice"}, {"event": None}])
def test_what_another_version_wrote_is_passed_over(told: dict[str, object]) -> None:
    assert events.from_json(told) is None
