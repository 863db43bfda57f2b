"""Evaluation sums over examples, so that batches and nodes can be added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedclient.data import Tokens, eval_batches
from fedclient.evaluation import evaluate


def some_tokens() -> list[Tokens]:
    return [Tokens([(7 * n + k) % 300 for k in range(4 + n)], 2 + n % 2) for n in range(7)]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_score_does_not_depend_on_the_batches(
    size: int, make_model: Callable[[str], Any]
) -> None:
    model, tokens = make_model("llama"), some_tokens()
    whole = evaluate(model, eval_batches(tokens, len(tokens), pad_id=0))
    found = evaluate(model, eval_batches(tokens, size, pad_id=0))
    assert (found.tokens, found.correct, found.examples) == (
        whole.tokens,
        whole.correct,
        len(tokens),
    )
    assert found.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
    assert found.tokens == sum(len(t.ids) - t.labels_from for t in tokens)


def test_evaluation_is_without_dropout_and_leaves_the_mode(
    make_model: Callable[[str], Any],
) -> None:
    model, tokens = make_model("gpt2"), some_tokens()  # GPT-2 has dropout of its own
    expected = evaluate(model, eval_batches(tokens, 4, pad_id=0))
    model.train()
    assert evaluate(model, eval_batches(tokens, 4, pad_id=0)) == expected
    assert model.training
    assert torch.is_grad_enabled()


def test_the_mode_is_restored_after_an_error(make_model: Callable[[str], Any]) -> None:
    model = make_model("llama").train()
    with pytest.raises(KeyError):
        evaluate(model, [{}])
    assert model.training
