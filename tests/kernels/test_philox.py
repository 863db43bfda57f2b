"""The reference generator is Philox4x32-10, in Python integers and in tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkernels.reference.probes import philox4x32

WORD = st.integers(0, 2**32 - 1)

# counter, key, words: the known answers that Random123 (Salmon et al., SC 2011) ships.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    assert philox4x32(counter, key) == words


@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=9), st.tuples(WORD, WORD))
def test_tensors_give_the_words_of_integers(counters, key):
    columns = tuple(
        torch.tensor(column, dtype=torch.int64) for column in zip(*counters, strict=True)
    )
    words = torch.stack(philox4x32(columns, key), dim=1)
    assert [tuple(row) for row in words.tolist()] == [philox4x32(c, key) for c in counters]
