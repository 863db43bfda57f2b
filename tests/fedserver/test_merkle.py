"""The Merkle tree against its recursive definition in RFC 6962, and against the RFC's test vectors."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from fedserver.merkle import GrowingTree, inclusion_path, root_of_path

LEAVES = st.lists(st.binary(max_size=4), max_size=40)


def defined_root(leaves: list[bytes]) -> bytes:
    """MTH of RFC 6962, section 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = max(2**i for i in range(20) if 2**i < len(leaves))
    return hashlib.sha256(b"\x01" + defined_root(leaves[:k]) + defined_root(leaves[k:])).digest()


@given(LEAVES)
def test_every_prefix_has_the_root_that_the_rfc_defines(leaves: list[bytes]) -> None:
    tree = GrowingTree()
    for count in range(len(leaves) + 1):
        assert tree.root() == defined_root(leaves[:count])
        assert tree.size == count
        before = tree.copy()
        if count < len(leaves):
            tree.append(leaves[count])
            assert before.root() == defined_root(leaves[:count])


def test_known_roots() -> None:
    """The inputs and roots of the reference implementation of Certificate Transparency."""
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657",
              "606162636465666768696a6b6c6d6e6f"]  # fmt: skip
    tree = GrowingTree([bytes.fromhex(text) for text in inputs])
    assert tree.root().hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
    assert GrowingTree([b""]).root().hex() == (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    )


@given(leaves=LEAVES.filter(bool), data=st.data())
def test_a_path_proves_its_leaf_at_its_place_and_nothing_else(
    leaves: list[bytes], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    path, root, size = inclusion_path(leaves, index), defined_root(leaves), len(leaves)
    assert root_of_path(leaves[index], index, size, path) == root
    assert root_of_path(leaves[index] + b"x", index, size, path) != root
    assert root_of_path(leaves[index], index, size, [*path, root]) is None
    if path:
        assert root_of_path(leaves[index], index, size, path[:-1]) != root
        at = data.draw(st.integers(0, len(path) - 1))
        other = [*path[:at], hashlib.sha256(path[at]).digest(), *path[at + 1 :]]
        assert root_of_path(leaves[index], index, size, other) != root
    for place in (-1, size, size + 1):
        assert root_of_path(leaves[index], place, size, path) is None
