"""An invitation makes one node, once; a node is let in until it is revoked, and each time once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedhost.enrolment import EnrolmentRefused, JoinRequest, RefusalKind, Token
from fedhost.node_signature import Signed
from fedserver.deployment.registry import SWEEP_EVERY, EnrolledKeys, Registry

NOW, LATER = 1e9, 1e9 + 3600


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    opened = Registry(tmp_path / "enrolment.db")
    yield opened
    opened.close()


def asked(token: Token, device: str = "a") -> JoinRequest:
    return JoinRequest(
        secret=token.secret.hex(),
        transport_key=f"key of {device}",
        update_key=device.encode().hex().ljust(64, "0"),
        transport_signature="0" * 64,
        update_signature="0" * 128,
    )


def invited(registry: Registry, name: str = "clinic") -> Token:
    token = Token.new(bytes(32))
    registry.invite(name, token, LATER)
    return token


def signed(second: float, device: str = "a") -> Signed:
    return Signed(f"key of {device}", str(second), second)


def refused(kind: RefusalKind, call: object, *arguments: object) -> None:
    with pytest.raises(EnrolmentRefused) as refusal:
        call(*arguments)  # type: ignore[operator]
    assert refusal.value.kind == kind


def test_a_token_lets_one_device_join_once(registry: Registry) -> None:
    token = invited(registry)
    refused("unknown-token", registry.redeem, asked(Token.new(bytes(32))), NOW)
    node = registry.redeem(asked(token), NOW)
    assert node.name == "clinic"
    refused("used-token", registry.redeem, asked(token, "b"), NOW)
    # Its own answer may have been lost.
    assert registry.redeem(asked(token), NOW + 1) == node
    assert registry.nodes() == [node]


def test_an_expired_token_is_refused_and_not_located(registry: Registry) -> None:
    token = invited(registry)
    assert registry.is_invited(token.locator, NOW)
    assert not registry.is_invited(token.verifier, NOW)
    assert not registry.is_invited(token.locator, LATER)
    refused("expired-token", registry.redeem, asked(token), LATER)
    assert registry.nodes() == []


def test_a_new_invitation_replaces_one_that_nobody_used(registry: Registry) -> None:
    first, second = invited(registry), invited(registry)
    refused("unknown-token", registry.redeem, asked(first), NOW)
    registry.redeem(asked(second), NOW)
    refused("name-taken", registry.invite, "clinic", Token.new(bytes(32)), LATER)


def test_keys_are_not_used_twice(registry: Registry) -> None:
    registry.redeem(asked(invited(registry)), NOW)
    refused("key-taken", registry.redeem, asked(invited(registry, "cafe")), NOW)


def test_a_revoked_node_stays_out_and_its_name_is_free(registry: Registry) -> None:
    token = invited(registry)
    registry.redeem(asked(token), NOW)
    assert registry.admit(signed(1.0)).name == "clinic"
    assert registry.revoke("clinic", NOW)
    refused("revoked", registry.admit, signed(2.0))
    refused("revoked", registry.redeem, asked(token), NOW)
    assert not registry.revoke("clinic", NOW)
    refused("key-taken", registry.redeem, asked(invited(registry)), NOW)
    registry.redeem(asked(invited(registry), "b"), NOW)
    assert registry.admit(signed(3.0, "b")).name == "clinic"


def test_a_run_sees_who_is_enrolled_now(tmp_path: Path) -> None:
    path = tmp_path / "enrolment.db"
    registry, keys = Registry(path), EnrolledKeys(path)
    assert dict(keys) == {}
    node = registry.redeem(asked(invited(registry)), NOW)
    assert dict(keys) == {"clinic": node.update_key}
    registry.revoke("clinic", NOW)
    assert "clinic" not in keys
    registry.close()


def test_revoking_voids_an_open_invitation(registry: Registry) -> None:
    token = invited(registry)
    assert registry.open_invitations(NOW) == {"clinic": LATER}
    assert registry.revoke("clinic", NOW)
    refused("unknown-token", registry.redeem, asked(token), NOW)


def test_a_signed_time_counts_once_for_each_node_also_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "enrolment.db"
    first = Registry(path)
    for device in "ab":
        first.redeem(asked(invited(first, device), device), NOW)
        first.admit(signed(NOW, device))
    first.close()
    second = Registry(path)
    for device in "ab":
        refused("replayed", second.admit, signed(NOW, device))
        second.admit(signed(NOW + 1, device))
    refused("unknown-node", second.admit, signed(NOW, "c"))
    second.close()


def test_sweeping_forgets_only_what_is_stale_anyway(registry: Registry) -> None:
    registry.redeem(asked(invited(registry)), NOW)
    for number in range(SWEEP_EVERY + 1):
        registry.admit(signed(NOW + number))
    refused("replayed", registry.admit, signed(NOW + SWEEP_EVERY - 300))
    assert registry.admit(signed(NOW)).name == "clinic"


def test_of_many_devices_with_one_token_one_joins(tmp_path: Path) -> None:
    path = tmp_path / "enrolment.db"
    registry = Registry(path)
    token = invited(registry)
    outcomes: list[str] = []

    def device(name: str) -> None:
        own = Registry(path)
        try:
            own.redeem(asked(token, name), NOW)
            outcomes.append("joined")
        except EnrolmentRefused as refusal:
            outcomes.append(refusal.kind)
        finally:
            own.close()

    threads = [threading.Thread(target=device, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["joined", *["used-token"] * 5]
    registry.close()
