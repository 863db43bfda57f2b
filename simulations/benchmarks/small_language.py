"""A small language model for comparisons that must take minutes: a Llama that has read a manual.

Its language is that of Python's reference manual, which comes with every Python (``pydoc_data``): prose
that no node of a comparison holds. One that has read next to nothing learns from all nodes the same
first thing, which words are frequent, and comparisons of mixing would be about that alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aggregators import Layout
from aggregators.methods import FirstOrderMethod
from fedclient.data import Tokens, batches, tokenise
from fedclient.local import first_order
from fedclient.records import Example

VOCABULARY = 1024
MAX_LENGTH = 64
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def manual() -> list[Example]:
    """Neighbouring sentences of the manual's longer paragraphs, as questions and answers."""
    from pydoc_data.topics import topics

    found = []
    for topic, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            sentences = re.split(r"(?<=[.:]) ", words) if len(words) > 80 else []
            found += [
                Example((("user", one), ("assistant", two)), topic)
                for one, two in zip(sentences[::2], sentences[1::2], strict=False)
            ]
    return found


def tokenizer(examples: Sequence[Example]) -> Any:
    """A byte-level BPE of these examples with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((text for e in examples for _, text in e.messages), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=SPECIAL[0], pad_token=SPECIAL[0]
    )
    fast.chat_template = TEMPLATE
    return fast


def write_model(
    folder: Path,
    words: Any,
    read: Sequence[Example],
    seed: int,
    steps: int = 400,
    hidden: int = 128,
    layers: int = 2,
) -> None:
    """Write a Llama that has read ``read``, 16 a step, and its tokenizer to a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    configuration = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(configuration)
    # Questions are text to read as well.
    tokens = [Tokens(t.ids, 1) for t in tokenise(read, words, MAX_LENGTH)]
    method = FirstOrderMethod(
        target_modules=(), master_seed=0, optimiser="adamw", error_feedback=False
    )
    stream = batches(tokens, 16, steps, seed, 0)
    first_order.train(
        model, Layout.from_model(model), stream, method, seed=seed, learning_rate=2e-3, steps=steps
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
