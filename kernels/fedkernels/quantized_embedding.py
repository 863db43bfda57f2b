"""An embedding of 8 bits a weight, and the output head that shares its matrix.

In a small model the table of word vectors is a large part of all weights (a fifth of SmolLM2-135M's),
and it is most often the output head as well: the two are quantised as one matrix and stay tied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedkernels.quantized import quantize
from fedkernels.quantized_linear import QuantizedLinear
from fedkernels.quantized_tensor import QuantizedTensor


class QuantizedEmbedding(nn.Module):
    """Rows of a frozen int8 matrix [words, width], returned in `dtype`."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, tensor: QuantizedTensor, dtype: torch.dtype = torch.float32) -> None:
        if tensor.fmt != "int8":
            raise ValueError(f"tensor must be int8, a scale a row, and it is {tensor.fmt}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating point, and it is {dtype}")
        super().__init__()
        self.num_embeddings, self.embedding_dim = tensor.shape
        self.dtype = dtype
        # Views: a head that is made of the same tensor shares their memory.
        self.register_buffer("codes", tensor.codes.view(tensor.shape))
        self.register_buffer("scales", tensor.scales)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of `ids`, int64 [...], as [..., width]; IndexError outside the table."""
        codes = functional.embedding(ids, self.codes)
        scales = functional.embedding(ids, self.scales.unsqueeze(-1))
        return (codes * scales).to(self.dtype)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> QuantizedEmbedding:
        # model.to(torch.bfloat16) is about the type of activations; scales keep theirs.
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, fmt=int8"


def quantize_embeddings(model: nn.Module) -> nn.Module:
    """Replace the input embedding and the output head of a causal model by int8, in place.

    Where the two are tied they share one matrix afterwards too. Return `model`.

    Args:
        model: a Hugging Face causal language model, not yet wrapped by peft.

    Raises:
        ValueError: its embedding is no plain `nn.Embedding`, or its head no plain `nn.Linear`.
    """
    causal: Any = model
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        raise ValueError(
            f"model has a {type(embedding).__name__} and a {type(head).__name__}, not a plain"
            " embedding and linear head"
        )
    words = quantize(embedding.weight, "int8")
    tied = head.weight is embedding.weight
    causal.set_input_embeddings(QuantizedEmbedding(words, embedding.weight.dtype))
    causal.set_output_embeddings(
        QuantizedLinear(words if tied else quantize(head.weight, "int8"), head.bias)
    )
    return model
