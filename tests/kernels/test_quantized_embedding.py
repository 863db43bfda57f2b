"""An int8 embedding gives the rows of its matrix, and stays tied to the head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fedkernels as fk


def tiny(tied: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    configuration = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(configuration).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_dequantised_matrix(dtype):
    matrix = fk.quantize(torch.randn(50, 20), "int8")
    ids = torch.tensor([[0, 49, 7], [7, 1, 0]])
    rows = fk.QuantizedEmbedding(matrix, dtype)(ids)
    assert rows.dtype == dtype
    assert torch.equal(rows, matrix.dequantize()[ids].to(dtype))


def test_a_model_in_another_type_keeps_its_scales():
    model = fk.quantize_embeddings(tiny(True))
    before = model.get_input_embeddings().scales.clone()
    model.to(torch.bfloat16)
    words = model.get_input_embeddings()
    assert torch.equal(words.scales, before)
    assert words(torch.tensor([3])).dtype == torch.bfloat16
    assert model(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_answers_as_with_the_dequantised_matrices(tied, dtype):
    model = tiny(tied, dtype)
    plain = copy.deepcopy(model)
    fk.quantize_embeddings(model)
    with torch.no_grad():
        for part in (plain.get_input_embeddings(), plain.get_output_embeddings()):
            part.weight.copy_(fk.quantize(part.weight.detach(), "int8").dequantize())
            if tied:
                break
    ids = torch.randint(0, 97, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    loss, expected = fk.causal_loss(model, batch), fk.causal_loss(plain, batch)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert float(loss.total.detach()) == pytest.approx(float(expected.total.detach()), rel=limit)
    assert loss.labelled == expected.labelled
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.codes.data_ptr() == words.codes.data_ptr()) == tied


def test_gradients_reach_an_adapter_through_the_quantised_head():
    model = fk.quantize_embeddings(fk.quantize_linears(tiny(True), "nf4"))
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    fk.accelerate(wrapped)
    ids = torch.randint(0, 97, (2, 9))
    loss = fk.causal_loss(
        wrapped, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    )
    loss.total.backward()
    gradients = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert gradients
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients)


def test_other_formats_and_other_models_are_refused():
    with pytest.raises(ValueError, match="tensor"):
        fk.QuantizedEmbedding(fk.quantize(torch.randn(8, 64), "nf4"))
    model = fk.quantize_embeddings(tiny(True))
    with pytest.raises(ValueError, match="model"):
        fk.quantize_embeddings(model)


def test_ids_outside_the_table_are_refused_as_torchs_own_embedding_does():
    embedding = fk.QuantizedEmbedding(fk.quantize(torch.eye(4), "int8"))
    for ids in ([-1], [4]):
        with pytest.raises(IndexError):
            embedding(torch.tensor(ids))
    with pytest.raises(ValueError, match="dtype"):
        fk.QuantizedEmbedding(fk.quantize(torch.eye(4), "int8"), torch.int8)
