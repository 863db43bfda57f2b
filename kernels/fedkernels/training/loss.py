"""The cross-entropy of a causal model without its logits: some rows at a time, gradient included.

The loss is a scalar at the end of the graph, so the gradient of the hidden states is known, but for a
factor, as soon as a chunk of logits is: it is computed in the forward pass from the very memory of the
chunk, and logits of all positions (200 MB in fp32 for 1024 tokens of a 49,152-word vocabulary, of
which plain autograd holds several copies) never exist. Positions without a label have no logits at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedkernels.autograd import without_autocast
from fedkernels.backends import threads
from fedkernels.quantized_linear import QuantizedLinear
from fedkernels.quantized_tensor import QuantizedTensor
from fedkernels.reference import training as reference
from fedkernels.reference.training import IGNORED
from fedkernels.training.checks import check_alike, check_floating, check_shape, compiled_for
from fedkernels.training.modules import is_watched

CHUNK = 256
# Architectures that change the logits after the head; they need the model's own forward pass.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class Loss(NamedTuple):
    """Sum of the cross-entropies in nats (differentiable), labels counted, labels predicted right."""

    total: Tensor
    labelled: int
    correct: int


def cross_entropy(
    hidden: Tensor, weight: Tensor | QuantizedTensor, labels: Tensor, chunk: int = CHUNK
) -> Loss:
    """Return the loss of the logits hidden weightᵀ at the labelled rows.

    Args:
        hidden: [..., width], the states that the output head reads; differentiable.
        weight: [vocabulary, width], the frozen head, in the dtype of `hidden`, or quantised: then it
            is in that dtype for as long as the loss is computed.
        labels: int64 [...], each an index of the vocabulary or -100 for none.
        chunk: rows of logits in memory at a time.

    Raises:
        ValueError: shapes or dtypes that do not fit, a label outside the vocabulary.
    """
    check_floating("hidden", hidden)
    if isinstance(weight, QuantizedTensor):
        weight = weight.dequantize(hidden.dtype)
    check_floating("weight", weight, 2)
    check_alike("weight", weight, "hidden", hidden)
    check_shape("weight", weight, (weight.shape[0], hidden.shape[-1]))
    check_shape("labels", labels, tuple(hidden.shape[:-1]))
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, not {labels.dtype}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    labels = labels.flatten()
    chosen = labels != IGNORED
    wanted = labels[chosen]
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(weight):
        raise ValueError(f"labels has values outside the vocabulary of {len(weight)}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    isa = compiled_for(hidden, weight)
    if isa is None or weight.requires_grad:
        return Loss(*reference.cross_entropy(rows, weight, labels))
    if not bool(chosen.all()):
        rows = rows[chosen]
    total, hits = _CrossEntropy.apply(rows, weight, wanted, chunk, isa)  # type: ignore[no-untyped-call]
    return Loss(total, int(wanted.numel()), int(hits))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, chunk: int, isa: int
    ) -> tuple[Tensor, Tensor]:
        from fedkernels import _cpu

        gradient = bool(ctx.needs_input_grad[0])
        rows, weight = rows.detach(), weight.detach()
        losses = torch.empty(len(rows), dtype=torch.float32)
        best = torch.empty_like(labels)
        drows = torch.empty_like(rows) if gradient else None
        for first in range(0, len(rows), chunk):
            part = slice(first, min(first + chunk, len(rows)))
            logits = functional.linear(rows[part], weight)
            _cpu.cross_entropy_(
                logits, losses[part], best[part], labels[part], gradient, isa, threads()
            )
            if drows is not None:
                torch.mm(logits, weight, out=drows[part])
        ctx.drows = drows
        hits = (best == labels).sum()
        ctx.mark_non_differentiable(hits)
        return losses.double().sum().float(), hits

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dtotal: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return ctx.drows * float(dtotal), None, None, None, None


def logit_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy in nats and the best index of each row: float32 and int64, [rows].

    logits: [rows, vocabulary], floating (float64 gives float64); labels: int64 [rows], each an index
    of the vocabulary, else ValueError. Not differentiable.
    """
    check_floating("logits", logits, 2)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, not {labels.dtype}")
    check_shape("labels", labels, (len(logits),))
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(f"labels has values outside the vocabulary of {logits.shape[1]}")
    isa = compiled_for(logits)
    if isa is None:
        wide = logits.dtype == torch.float64
        scores = logits.detach() if wide else logits.detach().float()
        wanted = scores.gather(1, labels[:, None])[:, 0]
        return scores.logsumexp(dim=1) - wanted, scores.argmax(dim=1)
    from fedkernels import _cpu

    losses = torch.empty(len(logits), dtype=torch.float32)
    best = torch.empty_like(labels)
    logits = logits.detach().contiguous()
    _cpu.cross_entropy_(logits, losses, best, labels.contiguous(), False, isa, threads())
    return losses, best


def causal_loss(model: nn.Module, batch: Mapping[str, Tensor], chunk: int = CHUNK) -> Loss:
    """Return the loss of a Hugging Face causal model, or of peft's wrapping of one, on a batch.

    batch: input_ids, attention_mask and labels, each int64 [batch, length]; labels are -100 where
    there is nothing to predict, and a label is predicted from the position before it. Where a model
    does more between its body and its logits than one linear, the logits are its own.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    targets = batch["labels"][:, 1:]
    parts = body_and_head(model)
    if parts is None:
        logits: Tensor = model(**inputs, use_cache=False).logits
        return _loss_of_logits(logits[:, :-1][targets != IGNORED], targets)
    body, head = parts
    hidden: Tensor = body(**inputs, use_cache=False).last_hidden_state
    if is_watched(head):
        return _loss_through(head, hidden[:, :-1][targets != IGNORED], targets, chunk)
    if type(head) is QuantizedLinear and head.bias is None:
        return cross_entropy(hidden[:, :-1], head.quantized, targets, chunk)
    if type(head) is nn.Linear and head.bias is None and head.weight.dtype == hidden.dtype:
        return cross_entropy(hidden[:, :-1], head.weight, targets, chunk)
    return _loss_of_logits(head(hidden[:, :-1][targets != IGNORED]), targets)


def _loss_through(head: nn.Module, rows: Tensor, targets: Tensor, chunk: int) -> Loss:
    """The loss where hooks want the head itself called: some rows at a time, computed again backward."""
    wanted = targets[targets != IGNORED]
    total, correct = rows.new_zeros((), dtype=torch.float32), 0
    for first in range(0, len(rows), chunk):
        part = slice(first, first + chunk)
        loss, hits = checkpoint(_chunk_loss, head, rows[part], wanted[part], use_reentrant=False)
        total, correct = total + loss, correct + int(hits)
    return Loss(total, int(wanted.numel()), correct)


def _chunk_loss(head: nn.Module, rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    logits: Tensor = head(rows)
    loss = functional.cross_entropy(logits.float(), wanted, reduction="sum")
    return loss, (logits.detach().argmax(dim=-1) == wanted).sum()


def _loss_of_logits(logits: Tensor, targets: Tensor) -> Loss:
    """logits [labelled, vocabulary] of the targets that are no -100."""
    wanted = targets[targets != IGNORED]
    total = functional.cross_entropy(logits.float(), wanted, reduction="sum")
    correct = int((logits.detach().argmax(dim=-1) == wanted).sum())
    return Loss(total, int(wanted.numel()), correct)


def body_and_head(model: nn.Module) -> tuple[Any, Any] | None:
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
