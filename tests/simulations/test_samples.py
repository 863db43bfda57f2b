"""Sample answers: generated as they were learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedclient import base_model
from fedclient.data import Example, tokenise
from simulations import samples


class Parrot:
    """Instead of a model: says what it was told to, and keeps what it was asked."""

    def __init__(self, says: list[int]) -> None:
        self.says = says
        self.asked: dict[str, Any] = {}

    def generate(self, **asked: Any) -> torch.Tensor:
        self.asked = asked
        return torch.cat([asked["input_ids"], torch.tensor([self.says])], dim=1)


@pytest.mark.parametrize("end", ["<|end|>", "<|system|>"])
def test_generation_begins_and_stops_where_learning_does(end: str, tiny_model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", end)
    example = Example((("user", "Why?"), ("assistant", "it is what it is")), "")
    (tokens,) = tokenise([example], tokenizer, 200)
    parrot = Parrot(tokens.ids[tokens.labels_from :])
    answer = samples._answer(parrot, tokenizer, example)
    assert answer.removesuffix(end) == "it is what it is"
    assert parrot.asked["input_ids"].tolist() == [tokens.ids[: tokens.labels_from]]
    assert parrot.asked["eos_token_id"] == tokens.ids[-1]
    assert tokenizer.decode([tokens.ids[-1]]) == end


def test_the_tiny_model_answers(tiny_model_folder: Path) -> None:
    tiny = base_model.load(str(tiny_model_folder))
    example = Example((("user", "Why?"), ("assistant", "So.")), "")
    assert samples._answer(tiny.model, tiny.tokenizer, example) == samples._answer(
        tiny.model, tiny.tokenizer, example
    )
