"""One forward pass over several copies of a batch, down to the predictions of each copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import fedkernels as fk
from fedclient.local.objectives import Predictions
from fedclient.local.vocabulary import Logits, streamed_losses
from fedclient.loss import IGNORED

Batch = dict[str, Tensor]

# Hidden states of the labelled positions [positions, width] -> their logits, block by block.
HeadLogits = Callable[[Tensor], Logits]


def streaming_head(model: nn.Module) -> nn.Module | None:
    """The output head, where all that stands after the body is one product with its rows; else None."""
    parts = fk.body_and_head(model)
    head: Any = parts[1] if parts else None
    if head is None or getattr(head, "bias", None) is not None:
        return None
    rows = isinstance(head, fk.QuantizedLinear) and head.fmt == "int8"
    found: nn.Module | None = head if rows or type(head) is nn.Linear else None
    return found


def predictions(
    model: nn.Module, batch: Batch, copies: int, head_logits: HeadLogits | None
) -> list[Predictions]:
    """What the model says of each of ``copies`` copies of the batch, which are one batch to it.

    ``head_logits``: how the head answers, None: the model computes its own logits, all at once.
    """
    inputs = {name: batch[name].repeat(copies, 1) for name in ("input_ids", "attention_mask")}
    targets = batch["labels"][:, 1:]
    chosen = targets != IGNORED
    labels, everywhere = targets[chosen], chosen.repeat(copies, 1)
    if head_logits is None:
        whole: Tensor = model(**inputs, use_cache=False).logits
        scores = whole[:, :-1][everywhere].double()
        losses = scores.logsumexp(1) - scores.gather(1, labels.repeat(copies)[:, None])[:, 0]
        best = scores.argmax(1) if len(scores) else labels
    else:
        parts = fk.body_and_head(model)
        assert parts is not None
        body, head = parts
        hidden: Tensor = body(**inputs, use_cache=False).last_hidden_state
        rows = hidden[:, :-1][everywhere]
        vocabulary = head.out_features
        losses, best = streamed_losses(head_logits(rows), vocabulary, labels.repeat(copies))
    examples = chosen.nonzero()[:, 0]
    return (
        [
            Predictions(own_losses, own_best, labels, examples)
            for own_losses, own_best in zip(losses.chunk(copies), best.chunk(copies), strict=True)
        ]
        if len(labels)
        else [Predictions(losses, best, labels, examples)] * copies
    )


def rows_of(weight: Tensor | fk.QuantizedTensor, first: int, past: int, dtype: Any) -> Tensor:
    """Rows [first, past) of a matrix in ``dtype``: a view where it has that type already.

    Of a quantised matrix only those rows are dequantised where a row has its own scale (int8).
    """
    if isinstance(weight, Tensor):
        return weight.view(weight.shape[0], -1)[first:past].to(dtype)
    rows, columns = weight.shape
    if (first, past) == (0, rows):
        return weight.dequantize(dtype)
    if weight.fmt != "int8" or weight.block != columns:
        return weight.dequantize(dtype)[first:past]
    codes = weight.codes[first * columns : past * columns]
    part = fk.QuantizedTensor(
        "int8", (past - first, columns), columns, codes, weight.scales[first:past]
    )
    return part.dequantize(dtype)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, which keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"
