"""An accelerated model computes what it computed before: loss, gradients, generation, any structure."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fedkernels as fk

SIZES = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Results = tuple[float, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def same_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


def llama_like(architecture: str, **settings: Any) -> nn.Module:
    import transformers

    configuration = getattr(transformers, f"{architecture}Config")(**SIZES | settings)
    return getattr(transformers, f"{architecture}ForCausalLM")(configuration)


def adapted(model: nn.Module, dropout: float = 0.0, **settings: Any) -> nn.Module:
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", **settings)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped.train()


def batch_of(padding: str = "right") -> dict[str, Tensor]:
    ids = torch.randint(3, SIZES["vocab_size"], (3, 21))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[0, 15:] = 0
    elif padding == "left":
        mask[0, :6] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :8] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_step(model: nn.Module, batch: dict[str, Tensor]) -> Results:
    return _step(model, model(**batch, use_cache=False).loss)


def fast_step(model: nn.Module, batch: dict[str, Tensor]) -> Results:
    loss = fk.causal_loss(model, batch)
    return _step(model, loss.total / max(1, loss.labelled))


def _step(model: nn.Module, loss: Tensor) -> Results:
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(mine: Results, theirs: Results, tolerance: float) -> None:
    assert mine[0] == pytest.approx(theirs[0], rel=tolerance)
    assert mine[1].keys() == theirs[1].keys()
    assert len(mine[1]) > 0
    for name, gradient in theirs[1].items():
        distance = (mine[1][name] - gradient).norm()
        assert distance <= tolerance * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_loss_and_gradients_are_the_plain_models(architecture, padding):
    model = adapted(llama_like(architecture, tie_word_embeddings=True))
    batch = batch_of(padding)
    theirs = plain_step(model, batch)
    with fk.accelerated(model) as report:
        mine = fast_step(model, batch)
    assert_same(mine, theirs, 2e-5)
    assert report.accelerated["attention"] == 2
    assert report.accelerated["mlp"] == 2
    assert report.accelerated["adapter"] == 14


def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_plain_model():
    """The truth is the same weights in fp32; both lose to rounding, now one more, now the other."""
    model = adapted(llama_like("Llama").to(torch.bfloat16))
    batch = batch_of()
    exact = plain_step(copy.deepcopy(model).float(), batch)
    theirs = plain_step(model, batch)
    fk.accelerate(model)
    mine = fast_step(model, batch)
    assert mine[0] == pytest.approx(exact[0], rel=2e-3)
    assert distance(mine, exact) < 2 * distance(theirs, exact) < 0.05


def distance(one: Results, other: Results) -> float:
    """Of all gradients as one vector, relative to the second."""
    pairs = [(one[1][name], gradient) for name, gradient in other[1].items()]
    far = sum(float((a - b).square().sum()) for a, b in pairs)
    return (far / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def test_every_backend_accelerates(backend):
    model = adapted(llama_like("Llama"))
    batch = batch_of()
    theirs = plain_step(model, batch)
    fk.accelerate(model)
    assert_same(fast_step(model, batch), theirs, 2e-5)


def test_restore_gives_the_plain_model_back():
    model = adapted(llama_like("Llama"))
    batch = batch_of()
    before = plain_step(model, batch)
    first, second = fk.accelerate(model), fk.accelerate(model)
    assert first == second
    assert str(first).startswith("accelerated: 14 LoRA linear, 2 attention, 2 MLP, 5 RMSNorm")
    fk.restore(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    after = plain_step(model, batch)
    assert after[0] == before[0]
    assert all(torch.equal(after[1][name], before[1][name]) for name in before[1])


@pytest.mark.parametrize("bias", [True, False])
def test_biases_and_models_without_adapters(bias):
    model = llama_like("Llama", attention_bias=bias, mlp_bias=bias).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    batch = batch_of()
    theirs = model(**batch).logits
    fk.accelerate(model)
    torch.testing.assert_close(model(**batch).logits, theirs, rtol=1e-4, atol=1e-5)
    assert not fk.causal_loss(model, batch).total.requires_grad


def test_two_adapters_one_of_them_frozen():
    model = adapted(llama_like("Llama"))
    model.add_adapter("view", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B.view" in name:
            nn.init.normal_(parameter, std=0.2)
    model.base_model.set_adapter(["view", "default"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name and "lora_A" not in name)
    batch = batch_of()
    theirs = plain_step(model, batch)
    fk.accelerate(model)
    assert_same(fast_step(model, batch), theirs, 2e-5)


def test_adapters_that_come_and_go_are_followed():
    model = llama_like("Llama").requires_grad_(False)
    batch = batch_of()
    fk.accelerate(model)
    wrapped = adapted(model)
    mine = fast_step(wrapped, batch)
    with wrapped.disable_adapter():
        without = float(wrapped(**batch).loss)
    fk.restore(wrapped)
    assert_same(mine, plain_step(wrapped, batch), 2e-5)
    with wrapped.disable_adapter():
        assert without == pytest.approx(float(wrapped(**batch).loss), rel=1e-5)
    assert without != pytest.approx(mine[0], rel=1e-3)


def test_dropout_in_training_is_the_modules_own():
    model = adapted(llama_like("Llama"), dropout=0.3)
    batch = batch_of()
    torch.manual_seed(0)
    theirs = plain_step(model, batch)
    state = torch.get_rng_state()
    fk.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert_same(fast_step(model, batch), theirs, 2e-5)


def test_dora_is_left_to_peft():
    model = adapted(llama_like("Llama"), use_dora=True)
    batch = batch_of()
    theirs = plain_step(model, batch)
    fk.accelerate(model)
    assert_same(fast_step(model, batch), theirs, 2e-5)


def test_trained_base_weights_get_their_gradients():
    model = llama_like("Llama")
    batch = batch_of()
    theirs = plain_step(model, batch)
    fk.accelerate(model)
    assert_same(fast_step(model, batch), theirs, 2e-5)


def test_generation_with_a_cache_stays_right():
    model = llama_like("Llama").requires_grad_(False).eval()
    ids = batch_of()["input_ids"][:1]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(ids, **settings)
    fk.accelerate(model)
    assert torch.equal(model.generate(ids, **settings), theirs)


def test_hooks_on_a_part_are_called():
    model = adapted(llama_like("Llama"))
    seen: list[str] = []
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").register_forward_hook(
        lambda *_: seen.append("up_proj")
    )
    fk.accelerate(model)
    fast_step(model, batch_of())
    assert seen == ["up_proj"]


def test_what_stands_in_for_a_part_is_called():
    """By the fused module around it, with the rows that it would multiply itself."""
    model, batch = llama_like("Llama").requires_grad_(False), batch_of()
    fk.accelerate(model)
    expected = fk.causal_loss(model, batch).total
    seen: list[str] = []
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        part = model.get_submodule(f"model.layers.1.{name}")

        def stand_in(x: Tensor, part: Any = part, name: str = name) -> Tensor:
            seen.append(name)
            return nn.functional.linear(x, 2 * part.weight) / 2

        stand_in.stands_in = True
        part.__dict__["forward"] = stand_in
        torch.testing.assert_close(fk.causal_loss(model, batch).total, expected)
        assert seen.pop() == name or name in seen
    assert set(seen) == {"self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"}


def test_an_unknown_architecture_is_left_alone_and_right():
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(
        vocab_size=120, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(settings)
    batch = batch_of()
    theirs = plain_step(model, batch)
    report = fk.accelerate(model)
    assert report.accelerated == {}
    assert report.left["Conv1D"] == 8
    assert_same(fast_step(model, batch), theirs, 2e-5)


def test_what_looks_known_and_computes_something_else_is_left_alone():
    """Gemma's norm multiplies by 1 + weight, and its activation is not SiLU."""
    model = adapted(llama_like("Gemma"))
    batch = batch_of()
    theirs = plain_step(model, batch)
    report = fk.accelerate(model)
    assert report.left["GemmaRMSNorm"] == 5
    assert "norm" not in report.accelerated
    assert "mlp" not in report.accelerated
    assert report.accelerated["adapter"] == 14
    assert_same(fast_step(model, batch), theirs, 2e-5)


RELATIVES = {
    "SmolLM3": {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 2},
    "Olmo2": {},
    "StableLm": {},
    "Gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 4},
    "Granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "Glm4": {},
}


@pytest.mark.parametrize("architecture", RELATIVES)
def test_relatives_of_llama_keep_what_is_their_own(architecture):
    """No rotation in some layers, norms over all heads, partial rotation, soft caps, multipliers."""
    model = adapted(llama_like(architecture, **RELATIVES[architecture]))
    # From small random weights nothing depends on positions.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    batch = batch_of()
    theirs = plain_step(model, batch)
    report = fk.accelerate(model)
    assert report.accelerated["adapter"] > 0
    assert_same(fast_step(model, batch), theirs, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_do_not_rotate_are_told_from_those_that_do(dtype):
    """SmolLM3 has rotary positions in three of four layers."""
    model = adapted(llama_like("SmolLM3", num_hidden_layers=5).to(dtype))
    batch = batch_of()
    theirs = plain_step(model, batch)
    report = fk.accelerate(model)
    assert report.accelerated["attention"] == 4
    assert report.left["SmolLM3Attention"] == 1
    tolerance = 2e-5 if dtype == torch.float32 else 5e-2
    assert distance(fast_step(model, batch), theirs) <= tolerance


@pytest.mark.parametrize("architecture", ["Olmo2", "StableLm"])
def test_attention_that_cannot_answer_the_trial_is_left_alone(architecture):
    """OLMo 2 normalises q and k before they are heads, StableLM rotates a part of each head."""
    model = adapted(llama_like(architecture))
    batch = batch_of()
    theirs = plain_step(model, batch)
    report = fk.accelerate(model)
    assert report.left[f"{architecture}Attention"] == 2
    assert report.accelerated["adapter"] == 14
    assert_same(fast_step(model, batch), theirs, 2e-5)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_under_autocast_the_plain_model_chooses_the_types(base):
    plain = llama_like("Llama")
    model = adapted(plain if base == "dense" else fk.quantize_linears(plain, "nf4"))
    batch = batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(**batch, use_cache=False)
    fk.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        mine = model(**batch, use_cache=False)
        again = fk.causal_loss(model, batch)
    assert mine.logits.dtype == theirs.logits.dtype
    assert mine.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-3)
    mean = again.total.item() / again.labelled
    assert mean == pytest.approx(theirs.loss.item(), rel=1e-3)
    again.total.backward()


def test_no_labels_give_zero_gradients():
    model = adapted(llama_like("Llama"))
    fk.accelerate(model)
    batch = batch_of()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, gradients = fast_step(model, batch)
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients.values())


def test_a_copy_computes_with_its_own_weights():
    model, batch = adapted(llama_like("Llama")), batch_of()
    fk.accelerate(model)
    twin, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    mine = fast_step(twin, batch)
    assert_same(fast_step(read, batch), fast_step(model, batch), 0)
    fk.restore(twin)
    assert_same(mine, plain_step(twin, batch), 2e-5)
