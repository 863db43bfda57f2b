"""A tiny Llama with random weights and some rows of data: a deployment's cost without a model's."""

from __future__ import annotations

import json
from pathlib import Path

import torch

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
)
TOPICS = ("rivers", "numbers", "colours", "animals", "cities", "tools")
SCENARIO = """
name = "tiny"
base_model = "{model}"
rounds = {rounds}
seed = 3
threads = 1
local_steps = 1
max_length = 48
micro_batch_size = 2
lora_r = 2
deadline_seconds = 600.0

[data]
source = "{data}"
partition = "iid"
held_out_max = 2
limit_per_node = 12

{nodes}
"""


def write_scenario(folder: Path, rounds: int, nodes: int) -> Path:
    """A scenario with such a model, its data and so many alike nodes; returns the TOML file."""
    folder.mkdir(parents=True, exist_ok=True)
    model, data = folder / "model", folder / "data.jsonl"
    _write_model(model)
    with data.open("w", encoding="utf-8") as file:
        for number in range(20 * nodes):
            topic = TOPICS[number % len(TOPICS)]
            row = {"instruction": f"Say something about {topic}, {number}?", "response": topic}
            file.write(json.dumps(row) + "\n")
    entries = "\n".join(f'[[nodes]]\nname = "node-{index}"\n' for index in range(nodes))
    path = folder / "tiny.toml"
    path.write_text(SCENARIO.format(model=model, data=data, rounds=rounds, nodes=entries))
    return path


def write_mixed_scenario(folder: Path, name: str, nodes: tuple[str, str], rounds: int) -> Path:
    """A scenario with such a model for a LoRA node and a zeroth-order node that sign."""
    alike = write_scenario(folder, rounds, 2)
    text = alike.read_text().partition("[[nodes]]")[0].replace('"tiny"', f'"{name}"')
    first, second = nodes
    path = folder / f"{name}.toml"
    path.write_text(
        f'signatures = "required"\npreset = "mixed"\nview_rank = 6\n{text}'
        "[zeroth_order]\nlearning_rate = 1e-3\npool_size = 64\nlocal_steps = 3\n\n"
        f'[[nodes]]\nname = "{first}"\n\n'
        f'[[nodes]]\nname = "{second}"\nstrand = "zeroth-order"\n'
    )
    return path


def _write_model(folder: Path) -> None:
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
    tokenizer.train_from_iterator(["say something about it"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    configuration = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        eos_token_id=0, pad_token_id=0, bos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = LlamaForCausalLM(configuration)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
