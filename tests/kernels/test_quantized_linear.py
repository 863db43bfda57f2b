"""The layer: a drop-in for nn.Linear whose weights survive casts, copies and state dicts."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import fedkernels as fk


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 64)
        self.block = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False))
        self.head = nn.Linear(64, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.lm_head = nn.Linear(64, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.block(self.embedding(tokens))
        return self.head(hidden) + self.lm_head(hidden)


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(1)
    return Tied()


def test_linears_are_replaced_but_for_the_shared_and_the_skipped(model):
    assert fk.quantize_linears(model, "nf4") is model
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["block.0"] is kinds["block.2"] is fk.QuantizedLinear
    assert kinds["head"] is kinds["lm_head"] is nn.Linear


def test_skip_names_modules_by_their_last_parts(model):
    fk.quantize_linears(model, "int8", skip=("block.2",))
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["block.2"] is nn.Linear
    assert kinds["block.0"] is kinds["lm_head"] is fk.QuantizedLinear


@pytest.mark.parametrize("fmt", ["nf4", "int4", "int8"])
def test_a_layer_computes_with_its_quantised_weight(fmt):
    layer = nn.Linear(64, 48)
    ours = fk.QuantizedLinear.from_linear(layer, fmt)
    x = torch.randn(3, 64)
    expected = x @ fk.quantize(layer.weight, fmt).dequantize().T + layer.bias
    assert torch.allclose(ours(x), expected, atol=1e-5)
    assert not list(parameter for parameter in ours.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("bias", [torch.zeros(3), torch.zeros(48, dtype=torch.int64)])
def test_a_bias_that_does_not_fit_is_refused(bias):
    tensor = fk.quantize(torch.ones(48, 64), "nf4")
    with pytest.raises(ValueError, match="bias"):
        fk.QuantizedLinear(tensor, bias)
    with pytest.raises(ValueError, match="tensor"):
        fk.QuantizedLinear(torch.ones(48, 64))


def test_a_state_dict_carries_the_weights(model):
    fk.quantize_linears(model, "nf4")
    torch.manual_seed(2)
    other = fk.quantize_linears(Tied(), "nf4")
    tokens = torch.arange(20)
    assert not torch.equal(other(tokens), model(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens), model(tokens))
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(other(tokens), model(tokens))


def test_casting_a_model_leaves_the_scales_alone(model):
    fk.quantize_linears(model, "nf4")
    before = model.block[0].quantized.dequantize()
    model.to(torch.bfloat16)
    assert torch.equal(model.block[0].quantized.dequantize(), before)
    assert model.block[0].bias.dtype == torch.bfloat16
    assert model(torch.arange(20)).dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(model)(torch.arange(20)), model(torch.arange(20)))


def test_the_weight_is_there_to_be_read_and_not_to_be_written():
    layer = fk.QuantizedLinear.from_linear(nn.Linear(8, 8), "nf4")
    assert torch.equal(layer.weight, layer.quantized.dequantize())
    with pytest.raises(RuntimeError, match="frozen"):
        layer.weight.data += 1
    with pytest.raises(RuntimeError, match="frozen"):
        layer.weight.data = torch.zeros(8, 8)
    with pytest.raises(AttributeError, match="weight"):
        layer.weight = torch.zeros(8, 8)


def test_peft_trains_an_adapter_beside_it(model):
    fk.quantize_linears(model, "nf4")
    tokens = torch.arange(20)
    before = model(tokens)
    config = peft.LoraConfig(r=4, target_modules=["block.0", "block.2"], lora_alpha=8)
    adapted = peft.inject_adapter_in_model(config, model)
    assert torch.allclose(adapted(tokens), before)
    adapted(tokens).square().mean().backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 2
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
