"""GGUF files: a model's weights and tokenizer come through; what cannot be read is named."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch

from fedclient import base_model
from fedclient.base_model import BaseModelError, LoadedModel, resolve
from fedclient.gguf_import import space_needed

Usage = namedtuple("Usage", "total used free")

# transformers' names of a Llama's weights and GGUF's.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    path = name.removesuffix(".weight")
    if path.startswith("model.layers."):
        _, _, layer, inner = path.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.weight"
    return f"{NAMES[path]}.weight"


def interleaved(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """llama.cpp keeps the two halves of a rotary pair beside each other."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def written(
    tiny: LoadedModel, path: Path, broken_merges: Sequence[tuple[str, str]] | None = None
) -> Path:
    """The tiny Llama and its tokenizer, as a GGUF file of SmolLM's kind."""
    settings: Any = tiny.model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_dimension_count(settings.hidden_size // settings.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(settings.vocab_size)
    vocabulary = tiny.tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    special = set(tiny.tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if w in special else gguf.TokenType.NORMAL for w in words]
    )
    merges = json.loads(tiny.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in broken_merges or merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tiny.tokenizer.chat_template)
    for name, parameter in tiny.model.named_parameters():
        value = parameter.numpy().astype(numpy.float32)
        if "q_proj" in name:
            value = interleaved(value, settings.num_attention_heads)
        if "k_proj" in name:
            value = interleaved(value, settings.num_key_value_heads)
        writer.add_tensor(gguf_name(name), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tiny: LoadedModel, tmp_path: Path) -> Path:
    return written(tiny, tmp_path / "tiny.gguf")


def test_weights_come_through_bit_for_bit(
    tiny: LoadedModel,
    tiny_gguf: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    stages: list[float] = []
    folder = resolve(
        str(tiny_gguf), cache=tmp_path / "cache", progress=lambda _, share: stages.append(share)
    )
    assert capfd.readouterr() == ("", "")
    assert stages == sorted(stages)
    assert len(set(stages)) > 2
    found = base_model.load(str(folder))
    theirs = dict(found.model.named_parameters())
    assert theirs.keys() == dict(tiny.model.named_parameters()).keys()
    for name, parameter in tiny.model.named_parameters():
        assert torch.equal(theirs[name], parameter), name
    assert found.digest == tiny.digest
    assert found.tokenizer.chat_template == tiny.tokenizer.chat_template
    assert found.tokenizer.eos_token == tiny.tokenizer.eos_token
    # SmolLM's digits stand alone, whatever the merges.
    pieces = found.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1984")
    assert [piece for piece, _ in pieces][-4:] == ["1", "9", "8", "4"]

    assert resolve(str(tiny_gguf), cache=tmp_path / "cache") == folder
    renamed = tiny_gguf.rename(tmp_path / "other.gguf")
    assert resolve(str(renamed), cache=tmp_path / "cache") != folder


def test_the_space_asked_for_is_what_the_weights_take(
    tiny: LoadedModel, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = 4 * sum(parameter.numel() for parameter in tiny.model.parameters())
    needed = space_needed(tiny_gguf)
    assert weights < needed < weights + 10**8
    free = [needed - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, free[0]))
    with pytest.raises(BaseModelError, match="FEDBRAID_CACHE"):
        resolve(str(tiny_gguf), cache=tmp_path / "cache")
    free[0] = needed
    folder = resolve(str(tiny_gguf), cache=tmp_path / "cache")
    assert sum(path.stat().st_size for path in folder.rglob("*")) < needed


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q8_0"])
def test_the_space_does_not_depend_on_the_quantisation(kind: str, tmp_path: Path) -> None:
    numbers = numpy.linspace(-1, 1, 64 * 64, dtype=numpy.float32).reshape(64, 64)
    quantised = gguf.GGMLQuantizationType[kind]
    path = tmp_path / "some.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x.weight", gguf.quantize(numbers, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert space_needed(path) == 4 * 64 * 64 + 50_000_000


def test_an_unsupported_tensor_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "iq.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    size = gguf.GGML_QUANT_SIZES[kind][1]
    writer.add_tensor(
        "blk.0.attn_q.weight", numpy.zeros((4, size), dtype=numpy.uint8), raw_dtype=kind
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BaseModelError, match="IQ2_XXS") as caught:
        resolve(str(path), cache=tmp_path / "cache")
    assert "blk.0.attn_q.weight" in str(caught.value)
    assert "Q4_1" in str(caught.value)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_an_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "unknown.gguf"
    writer = gguf.GGUFWriter(path, "my-own")
    writer.add_tensor("x.weight", numpy.zeros((4, 4), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BaseModelError, match="cannot be converted"):
        resolve(str(path), cache=tmp_path / "cache")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.95])
def test_a_cut_file(share: float, tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BaseModelError, match=r"tiny\.gguf"):
        resolve(str(tiny_gguf), cache=tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_broken_tokenizer(tiny: LoadedModel, tmp_path: Path) -> None:
    path = written(tiny, tmp_path / "tiny.gguf", broken_merges=[("no", "pe")])
    with pytest.raises(BaseModelError, match="cannot be converted"):
        resolve(str(path), cache=tmp_path / "cache")


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_text("<html>404</html>" * 100)
    with pytest.raises(BaseModelError, match="not a readable GGUF file"):
        resolve(str(path), cache=tmp_path / "cache")
