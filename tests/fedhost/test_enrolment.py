"""Tokens and signed requests: whole or refused, and only by the right key at the right time."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fedhost.enrolment import EnrolmentRefused, Token, verifier_of
from fedhost.node_signature import (
    EARLIEST_SECONDS,
    OLDEST_SECONDS,
    public_pem,
    read_signed,
    signed_headers,
)

KEY, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
NOW = datetime(2030, 1, 1, tzinfo=UTC)


@given(st.binary(min_size=24, max_size=24), st.binary(min_size=32, max_size=32))
def test_a_token_is_read_as_it_was_written(secret: bytes, fingerprint: bytes) -> None:
    token = Token(secret, fingerprint)
    assert Token.parse(str(token)) == token
    assert token.verifier == verifier_of(secret)
    assert token.locator != token.verifier


@given(st.data())
def test_a_slip_in_a_token_is_noticed(data: st.DataObject) -> None:
    text = str(Token.new(bytes(32)))
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters(codec="ascii").filter(lambda c: c != text[place]))
    slipped = data.draw(st.sampled_from((text[:place], text[:place] + letter + text[place + 1 :])))
    with pytest.raises(EnrolmentRefused) as refusal:
        Token.parse(slipped)
    assert refusal.value.kind == "malformed-token"


@given(st.text())
def test_no_text_breaks_the_reading_of_a_token(text: str) -> None:
    with pytest.raises(EnrolmentRefused):
        Token.parse(text)


@given(st.floats(-600, 600))
def test_a_signed_request_is_fresh_or_refused(age: float) -> None:
    headers = signed_headers(KEY, NOW)
    now = NOW.timestamp() + age
    if -EARLIEST_SECONDS < age < OLDEST_SECONDS:
        signed = read_signed(headers, now)
        assert (signed.key, signed.seconds) == (public_pem(KEY), NOW.timestamp())
    else:
        with pytest.raises(EnrolmentRefused) as refusal:
            read_signed(headers, now)
        assert refusal.value.kind == "stale"


@given(st.data())
def test_headers_of_another_key_or_time_or_none_are_refused(data: st.DataObject) -> None:
    headers = signed_headers(KEY, NOW)
    name = data.draw(st.sampled_from(sorted(headers)))
    others = (signed_headers(OTHER, NOW), signed_headers(KEY, datetime(2030, 1, 2, tzinfo=UTC)))
    foreign = st.sampled_from([other[name] for other in others])
    value = data.draw((foreign | st.text()).filter(lambda text: text != headers[name]))
    for changed in (headers | {name: value}, {k: v for k, v in headers.items() if k != name}):
        with pytest.raises(EnrolmentRefused) as refusal:
            read_signed(changed, NOW.timestamp())
        assert refusal.value.kind == "bad-signature"
