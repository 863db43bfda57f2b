"""Shared fixtures: a tiny model of a real architecture with a tokenizer, and a small data file.

Hypothesis runs without deadlines: a busy machine is slow, not wrong. In CI its examples are fixed.
Without a GPU Triton's kernels run in its interpreter, which has to be said before Triton is imported,
hence before any test file is.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from aggregators.messages import Plan

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("fedbraid", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fedbraid")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOPICS = ("rivers", "numbers", "colours", "animals", "cities", "tools")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised 2-layer Llama with a byte-level tokenizer, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is it? it is what it is."], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    configuration = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = LlamaForCausalLM(configuration)
    folder = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 instructions with responses in 6 categories."""
    chance = random.Random(4)
    path = tmp_path_factory.mktemp("tiny-data") / "data.jsonl"
    with path.open("w") as file:
        for number in range(120):
            topic = TOPICS[number % len(TOPICS)]
            row = {
                "instruction": f"Say something about {topic}, number {number}?",
                "response": f"{topic} {chance.choice(['are', 'seem', 'look'])} fine",
                "category": topic,
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def lora_plan() -> Callable[..., Plan]:
    """A maker of LoRA plans, written flat: fields of Plan and of LoraMethod side by side."""

    from aggregators.messages import Plan
    from aggregators.methods import LoraMethod

    def make(**values: Any) -> Plan:
        own = {key: values.pop(key) for key in list(values) if key in LoraMethod.model_fields}
        return Plan.model_validate({"method": {"family": "low_rank"} | own} | values)

    return make
