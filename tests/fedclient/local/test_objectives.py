"""Objectives that are no loss, against their definitions."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclient.local.objectives import OBJECTIVES, Predictions, longest_common_subsequence

TOKENS = st.lists(st.integers(0, 3), max_size=9)


def said(best: list[int], labels: list[int], examples: list[int]) -> Predictions:
    losses = torch.arange(1, len(best) + 1, dtype=torch.float64)
    return Predictions(
        losses, *(torch.tensor(x, dtype=torch.int64) for x in (best, labels, examples))
    )


def values(predictions: Predictions) -> dict[str, float]:
    return {name: objective(predictions) for name, objective in OBJECTIVES.items()}


def test_a_worked_case() -> None:
    """Rows 0 and 2 have labels: the first is right but for one token, the other is right."""
    found = values(said([1, 2, 3, 4, 7, 8], [1, 3, 4, 4, 7, 8], [0, 0, 0, 0, 2, 2]))
    assert found["loss"] == pytest.approx(3.5)
    assert found["accuracy"] == pytest.approx(2 / 6)
    assert found["exact-match"] == pytest.approx(1 / 2)
    # 1 3 4 is common to 1 2 3 4 and 1 3 4 4.
    assert found["rouge-l"] == pytest.approx(1 - (3 / 4 + 1) / 2)


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=8), data=st.data())
def test_right_answers_are_no_error_and_wrong_ones_are_all(
    labels: list[int], data: st.DataObject
) -> None:
    examples = sorted(
        data.draw(st.lists(st.integers(0, 3), min_size=len(labels), max_size=len(labels)))
    )
    right, wrong = (
        values(said(labels, labels, examples)),
        values(said([label + 10 for label in labels], labels, examples)),
    )
    for name in ("accuracy", "exact-match", "rouge-l"):
        assert right[name] == 0.0
        assert wrong[name] == 1.0


def test_without_labels_there_is_nothing_to_lower() -> None:
    assert set(values(said([], [], [])).values()) == {0.0}


@given(one=TOKENS, other=TOKENS)
def test_the_longest_common_subsequence_is_that_of_its_recursion(
    one: list[int], other: list[int]
) -> None:
    @cache
    def length(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return 0
        if one[i - 1] == other[j - 1]:
            return length(i - 1, j - 1) + 1
        return max(length(i - 1, j), length(i, j - 1))

    assert longest_common_subsequence(one, other) == length(len(one), len(other))
