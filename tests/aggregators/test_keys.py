"""Keys: whole or absent on disk, their owner's alone, one for all who make it at once."""

from __future__ import annotations

import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregators.keys import (
    KeyFileError,
    authenticated,
    load,
    load_or_create,
    public_hex,
    sign,
    verify,
)


def test_a_key_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "node.pem"
    key = load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]
    assert public_hex(load_or_create(path)) == public_hex(load(path)) == public_hex(key)
    assert public_hex(load_or_create(tmp_path / "other.pem")) != public_hex(key)


def test_all_who_make_it_at_once_have_the_same_key(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def make(_: int) -> str:
        together.wait()
        return public_hex(load_or_create(tmp_path / "node.pem"))

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(make, range(8)))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["node.pem"]


@pytest.mark.parametrize("content", [b"", b"key", b"\xff" * 200, b"-----BEGIN PRIVATE KEY-----\n"])
def test_a_file_that_holds_no_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match=r"node\.pem"):
        load_or_create(path)
    assert path.read_bytes() == content


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_or_create(path)


def test_places_where_no_key_can_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "node.pem", tmp_path):
        with pytest.raises(KeyFileError):
            load_or_create(path)


@given(data=st.binary(max_size=99), at=st.integers(0, 511))
def test_a_signature_holds_for_its_bytes_and_its_key_alone(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    key, other = load_or_create(folder / "one.pem"), load_or_create(folder / "two.pem")
    signature = sign(key, data)
    assert signature == sign(key, data)
    assert verify(public_hex(key), data, signature)
    assert not verify(public_hex(other), data, signature)
    assert not verify(public_hex(key), data + b"x", signature)
    damaged = bytearray(signature)
    damaged[at // 8] ^= 1 << at % 8
    assert not verify(public_hex(key), data, bytes(damaged))
    for public in ("", "no digits", public_hex(key)[:-2]):
        assert not verify(public, data, signature)


@given(st.text(max_size=9), st.binary(max_size=9), st.text(max_size=9), st.binary(max_size=9))
def test_what_is_signed_says_one_type_and_payload(
    kind: str, payload: bytes, other_kind: str, other: bytes
) -> None:
    equal = authenticated(kind, payload) == authenticated(other_kind, other)
    assert equal == ((kind, payload) == (other_kind, other))
