"""The loss of the answer is the loss that Hugging Face computes over all positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fedclient.loss import IGNORED, answer_loss

ARCHITECTURES = ("llama", "tied", "gemma2", "granite", "gpt2", "bert")


def a_batch(seed: int = 3) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (3, 11), generator=chance)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row, (begin, length) in enumerate(((4, 11), (1, 7), (6, 9))):
        labels[row, :begin] = IGNORED
        labels[row, length:] = IGNORED
        mask[row, length:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def hugging_face_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over labelled tokens, as the model's own forward pass reports it."""
    return model(**batch, use_cache=False).loss


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_is_hugging_faces(architecture: str, make_model: Callable[[str], Any]) -> None:
    model, batch = make_model(architecture), a_batch()
    total, tokens, correct = answer_loss(model, batch)
    assert tokens == int((batch["labels"][:, 1:] != IGNORED).sum())
    torch.testing.assert_close(total / tokens, hugging_face_loss(model, batch))
    predicted = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits.argmax(-1)
    assert correct == int((predicted[:, :-1] == batch["labels"][:, 1:]).sum())


@pytest.mark.parametrize("architecture", ["llama", "tied", "gemma2", "gpt2"])
def test_loss_and_gradients_under_peft(architecture: str, make_model: Callable[[str], Any]) -> None:
    model, batch = make_model(architecture), a_batch(4)
    targets = "c_attn" if architecture == "gpt2" else "q_proj"
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=4,
            target_modules=[targets],
            init_lora_weights=False,
            fan_in_fan_out=architecture == "gpt2",
        ),
    )
    own = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert own
    total, tokens, _ = answer_loss(wrapped, batch)
    plain = hugging_face_loss(wrapped, batch)
    torch.testing.assert_close(total / tokens, plain)
    ours = torch.autograd.grad(total / tokens, own)
    for found, expected in zip(ours, torch.autograd.grad(plain, own), strict=True):
        torch.testing.assert_close(found, expected)
    with wrapped.disable_adapter():
        assert answer_loss(wrapped, batch)[0].item() != total.item()


def test_an_adapted_head_is_used(make_model: Callable[[str], Any]) -> None:
    model, batch = make_model("llama"), a_batch(5)
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    total, tokens, _ = answer_loss(wrapped, batch)
    torch.testing.assert_close(total / tokens, hugging_face_loss(wrapped, batch))
    with wrapped.disable_adapter():
        assert answer_loss(wrapped, batch)[0].item() != total.item()


def test_a_batch_without_labels_costs_nothing(make_model: Callable[[str], Any]) -> None:
    batch = a_batch()
    batch["labels"][:] = IGNORED
    total, tokens, correct = answer_loss(make_model("llama"), batch)
    assert (float(total), tokens, correct) == (0.0, 0, 0)
