"""Sample questions answered by the base and by the tuned model, for a person to judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aggregators import Layout
from aggregators.view import View
from fedclient import base_model
from fedclient.data import DataSpec, Example, load_partition
from fedclient.prompts import end_ids, prompt_ids
from fedclient.state import weights_of
from fedserver.configuration import RunConfiguration
from fedserver.planner import data_specification

NEW_TOKENS = 40


def sample_answers(
    configuration: RunConfiguration, base_folder: Path, view: View, count: int
) -> list[dict[str, str]]:
    """Greedy answers to ``count`` held-out questions, each of another node's data, before and after.

    A row that repeats a learnt one would show memory, so none is chosen.
    """
    base = base_model.load(str(base_folder), configuration.base_dtype)
    questions = _questions(configuration, count)
    threads = torch.get_num_threads()
    torch.set_num_threads(configuration.threads)
    try:
        tuned = weights_of(base, Layout.from_model(base.model), view).model
        answered = []
        for question in questions:
            answered.append(
                {
                    "question": question.messages[-2][1],
                    "expected": question.messages[-1][1],
                    "base": _answer(base.model, base.tokenizer, question),
                    "tuned": _answer(tuned, base.tokenizer, question),
                    "category": question.category,
                }
            )
        return answered
    finally:
        torch.set_num_threads(threads)


def _questions(configuration: RunConfiguration, count: int) -> list[Example]:
    specification = DataSpec.model_validate(data_specification(configuration))
    chosen: list[Example] = []
    for index in range(len(configuration.nodes)):
        own = load_partition(specification, index)
        new = [e for e, old in zip(own.held_out, own.repeats(), strict=True) if not old]
        if new and len(chosen) < count:
            chosen.append(new[0])
    return chosen


def _answer(model: Any, tokenizer: Any, example: Example) -> str:
    ids = torch.tensor([prompt_ids(example, tokenizer)])
    # A model's own settings may name another token than the one that answers were learnt to end with.
    stop = {"eos_token_id": ends[-1]} if (ends := end_ids(tokenizer)) else {}
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **stop,
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
