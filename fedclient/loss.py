"""The answer loss: cross-entropy over labelled tokens, with logits computed only where there are labels.

The head of a small model is a large part of its cost, and most positions of a prompt have no label.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100
# Architectures that change the logits after the head; they need the model's own forward pass.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int, int]:
    """Sum of the cross-entropies in nats (differentiable), labelled tokens, correct predictions.

    ``batch``: input_ids, attention_mask, labels, each int64 [batch, length]; labels are -100 where
    there is nothing to predict. A label is predicted from the position before it.
    """
    targets = batch["labels"][:, 1:]
    chosen = targets != IGNORED
    wanted = targets[chosen]
    logits = _logits_at(model, batch, chosen).float()
    loss_sum = functional.cross_entropy(logits, wanted, reduction="sum")
    correct = int((logits.detach().argmax(dim=-1) == wanted).sum())
    return loss_sum, int(wanted.numel()), correct


def _logits_at(model: nn.Module, batch: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """Logits [labelled, vocabulary] at the positions before the labelled ones."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    parts = _decoder_and_head(model)
    if parts is None:
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits[:, :-1][chosen]
    decoder, head = parts
    hidden: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
    result: Tensor = head(hidden[:, :-1][chosen])
    return result


def _decoder_and_head(model: nn.Module) -> tuple[Any, Any] | None:
    """The transformer body and the head of a causal model, None where they are not enough."""
    causal: Any = model
    if hasattr(causal, "get_base_model"):
        # peft swaps modules in place, so the inner model already runs the adapters.
        causal = causal.get_base_model()
    settings = getattr(causal, "config", None)
    if any(getattr(settings, name, None) not in (None, 1, 1.0) for name in _LOGIT_CHANGES):
        return None
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    body = getattr(causal, getattr(causal, "base_model_prefix", "") or "model", None)
    # Whatever else stands before the logits (BERT's transform, for one) needs the model itself.
    if {id(part) for part in causal.children()} != {id(body), id(head)}:
        return None
    return body, head
