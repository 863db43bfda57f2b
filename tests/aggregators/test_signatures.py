"""Signed replies: what a node's key signed passes as it was; every forgery has its verdict."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from aggregators import GateContext, UpdateRejected, Verdict, admit
from aggregators.keys import public_hex
from aggregators.messages import open_envelope
from aggregators.signatures import MAGIC, holds, sign_reply, split_signature

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
BLOCK = len(MAGIC) + 32 + 64
# Of an envelope in canonical JSON: fields that are given, by another value of the same type.
CHANGES = {
    "run": "b-run", "round": 4, "node": "laptop", "nonce": "f" * 16, "layout": "0" * 64,
    "base_digest": "0" * 64, "payload_digest": "0" * 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def asked(layout, make_plan):
    return GateContext(layout, make_plan(), public_key=public_hex(KEY))


def refused(payload, context):
    with pytest.raises(UpdateRejected) as caught:
        admit(payload, context)
    return caught.value.verdict


def test_a_signed_reply_is_the_unsigned_one_beside_its_signature(asked, make_reply, low_rank):
    reply = make_reply(low_rank(1), asked.plan)
    signed = sign_reply(reply, KEY)
    assert signed == sign_reply(reply, KEY)
    assert len(signed) == len(reply) + BLOCK
    found, signature = split_signature(signed)
    assert found == reply
    admitted = admit(signed, asked)
    assert admitted.update == low_rank(1)
    assert admitted.reply == reply
    assert admitted.signature == signature
    assert holds(open_envelope(reply), admitted.signature)


def test_a_signature_that_nobody_asked_for_is_not_kept(layout, make_plan, make_reply, low_rank):
    """Nobody knows whose key it is, so nothing may rest on it later."""
    asked = GateContext(layout, make_plan())
    reply = make_reply(low_rank(1), asked.plan)
    assert admit(reply, asked).signature is None
    assert admit(sign_reply(reply, KEY), asked).signature is None


def test_every_way_not_to_be_the_node(asked, make_reply, low_rank, forge):
    reply = make_reply(low_rank(1), asked.plan)
    mine, others = sign_reply(reply, KEY), sign_reply(reply, OTHER)
    another = sign_reply(make_reply(low_rank(2), asked.plan), KEY)
    assert refused(reply, asked) is Verdict.UNSIGNED
    assert refused(others, asked) is Verdict.FOREIGN_KEY
    # The node's key stands over a signature of another key, or over one of another update.
    head = len(MAGIC) + 32
    assert refused(mine[:head] + others[head:], asked) is Verdict.FORGED
    assert refused(another[:BLOCK] + reply, asked) is Verdict.FORGED
    assert refused(mine[: BLOCK - 1], asked) is Verdict.MALFORMED


@pytest.mark.parametrize("field", [*CHANGES, "examples"])
def test_the_signature_covers_every_field(asked, make_reply, low_rank, forge, field):
    reply = make_reply(low_rank(1), asked.plan)
    block = sign_reply(reply, KEY)[:BLOCK]

    def change(header, tensors):
        target = header["report"] if field == "examples" else header
        target[field] = 8 if field == "examples" else CHANGES[field]

    forged = forge(reply, envelope=change)
    _, signature = split_signature(block + forged)
    assert not holds(open_envelope(forged), signature)
    refused(block + forged, asked)


def test_who_it_is_from_is_settled_before_the_update_is_read(asked, make_reply, low_rank, forge):
    """A body that no parser survives is never seen unless the node itself signed it."""

    def destroy(header, tensors):
        tensors["body"] = tensors["body"][:5].repeat(7)
        tensors["more"] = tensors["body"].clone()

    reply = forge(make_reply(low_rank(1), asked.plan), envelope=destroy)
    assert refused(reply, asked) is Verdict.UNSIGNED
    assert refused(sign_reply(reply, OTHER), asked) is Verdict.FOREIGN_KEY
    assert refused(sign_reply(reply, KEY), asked) is Verdict.MALFORMED


def test_replays_of_signed_replies(asked, layout, make_plan, make_reply, low_rank):
    signed = sign_reply(make_reply(low_rank(1), asked.plan), KEY)
    seen = frozenset({asked.plan.nonce})
    again = GateContext(layout, asked.plan, seen, public_key=asked.public_key)
    assert refused(signed, again) is Verdict.DUPLICATE
    later = make_plan(round=4, nonce="a" * 16)
    context = GateContext(layout, later, seen, public_key=asked.public_key)
    assert refused(signed, context) is Verdict.REPLAYED
    unseen = GateContext(layout, later, public_key=asked.public_key)
    assert refused(signed, unseen) is Verdict.STALE


@given(data=st.data())
def test_one_bit_of_a_signed_reply(asked, make_reply, low_rank, data):
    """Whatever a bit on the way becomes, it is never another update under the node's name."""
    signed = bytearray(sign_reply(make_reply(low_rank(1), asked.plan), KEY))
    at = data.draw(st.integers(0, 8 * len(signed) - 1))
    signed[at // 8] ^= 1 << at % 8
    assert refused(bytes(signed), asked) not in (Verdict.ACCEPTED, Verdict.MISSING)
