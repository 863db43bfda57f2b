"""The Merkle tree of a log (RFC 6962, section 2.1): roots of growing lists, and proofs of membership.

Leaves and inner nodes are hashed under different prefixes, so that no leaf can pass for a node.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

LEAF, NODE = b"\x00", b"\x01"
EMPTY_ROOT = hashlib.sha256().digest()


def leaf_hash(leaf: bytes) -> bytes:
    """The hash of a leaf's bytes."""
    return hashlib.sha256(LEAF + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node over its two children's."""
    return hashlib.sha256(NODE + left + right).digest()


class GrowingTree:
    """The root of a list that is only appended to, in O(log n) memory and time a leaf.

    It holds the hashes of the complete subtrees that the leaves make, largest first: one for every bit
    that is set in their number.
    """

    def __init__(self, leaves: Sequence[bytes] = ()) -> None:
        self.size = 0
        self._complete: list[bytes] = []
        for leaf in leaves:
            self.append(leaf)

    def copy(self) -> GrowingTree:
        """A tree of its own with the same leaves."""
        found = GrowingTree()
        found.size, found._complete = self.size, list(self._complete)
        return found

    def append(self, leaf: bytes) -> None:
        """Add one leaf at the end."""
        joined = leaf_hash(leaf)
        below = self.size
        while below & 1:
            joined = node_hash(self._complete.pop(), joined)
            below >>= 1
        self._complete.append(joined)
        self.size += 1

    def root(self) -> bytes:
        """The hash of the tree over all leaves so far; of no bytes for none."""
        if not self._complete:
            return EMPTY_ROOT
        found = self._complete[-1]
        for left in reversed(self._complete[:-1]):
            found = node_hash(left, found)
        return found


def inclusion_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The siblings from a leaf up to the root, which prove that the leaf is at ``index``."""
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    return _path([leaf_hash(leaf) for leaf in leaves], index)


def root_of_path(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root that a proof leads to (RFC 9162, section 2.1.3.2); None for a path of a wrong length."""
    if not 0 <= index < size:
        return None
    place, last, found = index, size - 1, leaf_hash(leaf)
    for sibling in path:
        if last == 0:
            return None
        if place & 1 or place == last:
            found = node_hash(sibling, found)
            while not place & 1 and place:
                place >>= 1
                last >>= 1
        else:
            found = node_hash(found, sibling)
        place >>= 1
        last >>= 1
    return found if last == 0 else None


def _path(hashes: list[bytes], index: int) -> list[bytes]:
    if len(hashes) == 1:
        return []
    half = 1 << (len(hashes) - 1).bit_length() - 1
    left, right = hashes[:half], hashes[half:]
    if index < half:
        return [*_path(left, index), _root(right)]
    return [*_path(right, index - half), _root(left)]


def _root(hashes: list[bytes]) -> bytes:
    if len(hashes) == 1:
        return hashes[0]
    half = 1 << (len(hashes) - 1).bit_length() - 1
    return node_hash(_root(hashes[:half]), _root(hashes[half:]))
