"""The base as a plan asks for it: whole, or quantised once for all nodes of the process.

Linears are in the format asked for; embeddings and the head, which four bits would harm most, in eight.
The whole base stays in memory only where some node of the process works on it.
"""

from __future__ import annotations

import copy
import hashlib
from functools import lru_cache

import torch
from torch import nn

import fedkernels as fk
from aggregators.methods import BaseFormat
from fedclient import base_model
from fedclient.base_model import BaseModelError, LoadedModel

# References whose whole weights a plan has asked for: releasing those would load them every round.
_whole: set[tuple[str, str]] = set()


def load(reference: str, dtype: str, base_format: BaseFormat) -> LoadedModel:
    """The base in a format, frozen. Raises BaseModelError."""
    if base_format == "full":
        _whole.add((reference, dtype))
        return base_model.load(reference, dtype)
    return _quantised(reference, dtype, base_format)


def content_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of all parameters and codes, by their names."""
    summed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        summed.update(f"{name}|{list(value.shape)}|{value.dtype}|".encode())
        summed.update(value.view(-1).view(torch.uint8).numpy().data)
    return summed.hexdigest()


@lru_cache(maxsize=3)
def _quantised(reference: str, dtype: str, base_format: BaseFormat) -> LoadedModel:
    whole = base_model.load(reference, dtype)
    # Parameters are shared with the whole model: those that are not quantised stand in both.
    shared = {id(parameter): parameter for parameter in whole.model.parameters()}
    model = copy.deepcopy(whole.model, dict(shared))
    try:
        fk.quantize_embeddings(model)
        fk.quantize_linears(model, base_format)
    except ValueError as error:
        raise BaseModelError(f"base model {reference} in {base_format}: {error}") from None
    if not any(type(module) is fk.QuantizedLinear for module in _body(model)):
        raise BaseModelError(
            f"base model {reference} has no linear layer that {base_format} could hold; use"
            " base_format = 'full'"
        )
    if (reference, dtype) not in _whole:
        base_model.release()
    return LoadedModel(
        model, whole.tokenizer, whole.path, whole.digest, whole.layout, base_format,
        content_digest(model),
    )  # fmt: skip


def _body(model: nn.Module) -> list[nn.Module]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [module for module in model.modules() if module is not head]
