"""Plans as a coordinator would send them, and tiny models of unlike architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aggregators import Layout
from aggregators.messages import Plan
from aggregators.presets import PRESETS
from fedclient import base_model

VOCABULARY = 300


@pytest.fixture(scope="session")
def default_model_folder() -> Path:
    """The embedded default model, fetched on first use and kept in the cache."""
    return base_model.resolve(base_model.DEFAULT_MODEL)


@pytest.fixture
def tiny(tiny_model_folder: Path) -> base_model.LoadedModel:
    """The tiny Llama as a worker holds it: loaded once per process."""
    return base_model.load(str(tiny_model_folder))


@pytest.fixture
def make_plan(
    tiny: base_model.LoadedModel, tiny_data_file: Path, lora_plan: Callable[..., Plan]
) -> Callable[..., Plan]:
    """A function (preset, **changes) -> plan for the tiny Llama and the tiny data."""

    def make(preset: str = "braid", **changes: Any) -> Plan:
        method = PRESETS[preset]
        standard: dict[str, Any] = {
            "run": "r" * 16,
            "round": 1,
            "node": "one",
            "nonce": "0" * 32,
            "layout": Layout.from_model(tiny.model).fingerprint,
            "base_model": str(tiny.path),
            "base_digest": tiny.digest,
            "family": "low_rank",
            "action": "train",
            "preset": preset,
            "rank": 4,
            "alpha": 8.0,
            "rslora": False,
            "dropout": 0.0,
            "target_modules": ("all-linear",),
            "init": method.init,
            "train_a": method.train_a,
            "start": method.start,
            "sends": method.sends,
            "seed": 5,
            "shared_seed": 6,
            "local_steps": 2,
            "batch_size": 4,
            "learning_rate": 5e-3,
            "weight_decay": 0.0,
            "warmup_steps": 1,
            "max_length": 64,
            "dtype": "float32",
            "wire_dtype": None,
            "threads": 1,
            "evaluate": False,
            "deadline_seconds": 60.0,
            "max_norm": None,
            "accelerate": True,
            "data": {"source": str(tiny_data_file), "nodes": 2, "held_out_max": 4},
        }
        return lora_plan(**standard | changes)

    return make


@pytest.fixture(autouse=True)
def _same_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


@pytest.fixture
def make_model() -> Callable[[str], Any]:
    """A function from an architecture's name to a tiny random model of it, in evaluation mode."""
    import transformers

    small: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    gpt2: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    bert = small | {"is_decoder": True}
    bert.pop("num_key_value_heads")
    recipes: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", small | {"tie_word_embeddings": False}),
        "tied": ("Llama", small | {"tie_word_embeddings": True}),
        "gemma2": ("Gemma2", small | {"head_dim": 8, "final_logit_softcapping": 2.0}),
        "granite": ("Granite", small | {"logits_scaling": 4.0}),
        "gpt2": ("GPT2", gpt2),
        "bert": ("Bert", bert),
    }

    def make(name: str) -> Any:
        family, settings = recipes[name]
        configuration = getattr(transformers, f"{family}Config")(**settings)
        model = transformers.AutoModelForCausalLM.from_config(configuration)
        # Initial weights are so small that losses of right and wrong logits would hardly differ.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(5)
        return model.eval().requires_grad_(False)

    return make
