"""The round that is not committed yet: replies that were admitted are durable before it is.

A server that is started again asks only the nodes whose replies it does not have. What it has passes
the gate again, so that a row that was changed on disk costs a question and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from aggregators.messages import Plan
from aggregators.signatures import Signature, join_signature
from fedserver.exchange import Reply
from fedserver.ledger import Arrival, Ledger, LedgerError
from fedserver.outcome import Outcome


def remember(ledger: Ledger, outcome: Outcome) -> str:
    """Make an admitted reply durable; returns the digest of its blob."""
    plan, admitted = outcome.plan, outcome.admitted
    assert admitted is not None
    blob = ledger.put(admitted.reply)
    signature = vars(admitted.signature) if admitted.signature else None
    ledger.arrive(
        Arrival(plan.nonce, plan.round, plan.node, _digest(plan), blob, signature, outcome.seconds)
    )
    return blob


def recall(ledger: Ledger, plans: Mapping[int, Plan]) -> list[Reply]:
    """The replies that are already here to what is to be asked now."""
    arrived = ledger.arrivals()
    found = []
    for node_id, plan in plans.items():
        arrival = arrived.get(plan.nonce)
        if arrival is None or arrival.plan != _digest(plan):
            continue
        try:
            reply = ledger.get(arrival.blob)
            signature = Signature(**arrival.signature) if arrival.signature else None
            payload = join_signature(reply, signature)
        except (LedgerError, TypeError, ValueError):
            ledger.forget(arrival.blob)
            continue
        found.append(Reply(node_id, plan.round, payload, "", arrival.seconds))
    return found


def committed_before(ledger: Ledger) -> tuple[set[str], dict[str, str]]:
    """Of all entries: the nonces of admitted replies, and by node the key that signed its last one."""
    nonces: set[str] = set()
    keys: dict[str, str] = {}
    for entry in ledger.entries():
        for row in entry.content.get("nodes", ()):
            if row["verdict"] == "accepted":
                nonces.add(row["plan"]["nonce"])
            if signature := entry.signatures.get(row["update"] or ""):
                keys[row["node"]] = signature["key"]
            for member in row.get("members", ()):
                if key := member.get("key"):
                    keys[member["node"]] = key
    return nonces, keys


def _digest(plan: Plan) -> str:
    return hashlib.sha256(plan.model_dump_json().encode()).hexdigest()
