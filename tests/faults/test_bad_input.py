"""The catalogue of bad input against every family: a typed verdict each time, and a run that goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from aggregators import UpdateRejected, Verdict, admit
from aggregators.keys import public_hex
from aggregators.signatures import sign_reply
from fedserver import events
from fedserver.configuration import load
from fedserver.entry import canonical
from fedserver.exchange import Reply
from fedserver.ledger import Ledger
from fedserver.outcome import judge, row
from simulations import engines
from simulations.benchmarks.bad_input import CATALOGUE, expected_of, judge_case
from simulations.benchmarks.fuzz import fuzz
from simulations.benchmarks.specimens import content, specimens
from simulations.local_grid import Answer, Delivery
from simulations.run import simulate

FAMILIES = specimens()
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
LEAST_CASES = 60


def test_there_is_enough_of_everything() -> None:
    assert set(CATALOGUE) == {
        "values", "shapes", "updates", "containers", "protocol", "resources"
    }  # fmt: skip
    assert sum(len(section) for section in CATALOGUE.values()) >= LEAST_CASES
    assert set(FAMILIES) == {
        "low_rank", "seed_scalars", "factor_scalars", "pair", "projected_gradient", "sketch", "dense",
        "cohort",
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("section", CATALOGUE)
def test_every_case_has_a_verdict_that_says_what_is_wrong(section: str, family: str) -> None:
    specimen = FAMILIES[family]
    if not specimen.direct:
        admitted = admit(specimen.reply(), specimen.context).update
        assert admitted is not None
        assert content(admitted) == content(specimen.update)
    found = {name: judge_case(one, specimen) for name, one in CATALOGUE[section].items()}
    wrong = {
        name: verdict
        for name, verdict in found.items()
        if verdict not in expected_of(CATALOGUE[section][name], specimen)
    }
    assert wrong == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_verdict_can_stand_in_a_ledger(family: str) -> None:
    """What a hostile reply contains is quoted in a reason, and that must be JSON and printable."""
    specimen = FAMILIES[family]
    for section in CATALOGUE.values():
        for one in section.values():
            payload = one.damage(specimen.reply(), specimen)
            reply = Reply(2, specimen.context.plan.round, payload, "", 0.1)
            outcome = judge(reply, specimen.context, set())
            assert outcome.verdict is not Verdict.ACCEPTED
            assert outcome.reason.isprintable()
            assert canonical(row(outcome)).encode()


@pytest.mark.parametrize("family", FAMILIES)
def test_whoever_cannot_sign_does_not_reach_the_parsers(family: str) -> None:
    """A node with a key: of damage within the update nothing is seen that it did not sign itself."""
    specimen = FAMILIES[family].with_key(public_hex(KEY))
    cases = {name: one for section in CATALOGUE.values() for name, one in section.items()}
    for name, one in cases.items():
        if one.layer == "inside":
            payload = one.damage(specimen.reply(), specimen)
            with pytest.raises(UpdateRejected) as caught:
                admit(payload, specimen.context)
            assert caught.value.verdict in (Verdict.UNSIGNED, Verdict.TOO_LARGE), name
            with pytest.raises(UpdateRejected) as caught:
                admit(sign_reply(payload, KEY), specimen.context)
            expected = one.expected | ({Verdict.WRONG_FAMILY} if specimen.direct else set())
            assert caught.value.verdict in expected, name


SCENARIO = """
base_model = "{model}"
rounds = 1
threads = 1
local_steps = 1
max_length = 48
quorum = 2
max_update_bytes = 1_000_000
max_examples = 1000

[data]
source = "{data}"
held_out_max = 2
limit_per_node = 12

[[nodes]]
name = "first"
lora_r = 4

[[nodes]]
name = "second"
lora_r = 2

[[nodes]]
name = "bad"
lora_r = 2
"""


def test_a_node_that_sends_the_whole_catalogue_costs_only_itself(
    tiny_model_folder: Path, tiny_data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO.format(model=tiny_model_folder, data=tiny_data_file))
    sent: list[str] = []

    def hostile(fault: str, honest: Answer, deadline: float) -> Answer:
        def answer(message: Message, context: Context) -> list[Delivery]:
            deliveries = honest(message, context)
            last = context.node_config["partition-id"] == 2
            if message.metadata.message_type != MessageType.TRAIN or not last:
                return deliveries
            record = deliveries[0].reply.content["fedbraid"]
            assert isinstance(record, ConfigRecord)
            reply = record["payload"]
            assert isinstance(reply, bytes)
            main = "model.layers.0.self_attn.q_proj.weight#B"
            specimen = replace(FAMILIES["low_rank"], main=main)
            damaged = {
                name: one.damage(reply, specimen)
                for section in CATALOGUE.values()
                for name, one in section.items()
            }
            # The first round's view is the base model, and has no digest to leave out.
            payloads = {name: payload for name, payload in damaged.items() if payload != reply}
            sent.extend(payloads)
            return [
                Delivery(
                    Message(
                        RecordDict({"fedbraid": ConfigRecord({**record, "payload": payload})}),
                        reply_to=message,
                    )
                )
                for payload in payloads.values()
            ]

        return answer

    monkeypatch.setattr(engines, "faulty", hostile)
    told: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.NodeReplied) and event.node == "bad":
            told.append(event.verdict)

    summary = simulate(load(str(path)), tmp_path / "run", listen, samples=0)
    assert len(sent) >= LEAST_CASES
    assert [n for n, v in zip(sent, told, strict=True) if v == "accepted"] == []
    assert summary["after"]["loss"] < summary["before"]["loss"]
    ledger = Ledger(tmp_path / "run")
    assert ledger.verify() == []
    (entry,) = ledger.entries("round")
    verdicts: dict[str, list[str]] = {"first": [], "second": [], "bad": []}
    for found in entry.content["nodes"]:
        verdicts[found["node"]].append(found["verdict"])
    ledger.close()
    assert verdicts["first"] == verdicts["second"] == ["accepted"]
    assert sorted(verdicts["bad"]) == sorted(told)
    assert len(set(told)) >= 12


def test_random_damage_never_escapes() -> None:
    """The benchmark, with fewer examples; ``python -m simulations.benchmarks.fuzz`` tries 100,000."""
    found = fuzz(1500, 7)
    assert found.escaped == {}
    assert found.outcomes.total() == 1500
    assert len(found.outcomes) > 5
