"""GGUF files to a Hugging Face folder: dequantised once, in float32, so that nothing is rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedclient import foreign_bars

BYTES_PER_WEIGHT = 4
# The tokenizer and the configuration.
BYTES_BESIDE = 50_000_000

SUPPORTED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
             "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # fmt: skip


def convert(gguf: Path, target: Path, done: Callable[[float], None] | None = None) -> None:
    """Write ``target`` as a model folder; ``done`` hears what share of the time has passed, roughly.

    Raises BaseModelError for files that cannot be read.
    """
    from fedclient.base_model import BaseModelError

    tell = done or (lambda share: None)
    pre_tokenizer = _check(gguf)
    tell(0.15)
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        tell(0.4)
        with foreign_bars.hidden(modeling_gguf_pytorch_utils):
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tell(0.9)
    except Exception as error:  # whatever the file holds; tokenizers raises nothing narrower
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BaseModelError(f"{gguf}: cannot be converted: {first}") from None
    _forget_quantisation(model)
    if pre_tokenizer in ("smollm", "smollm2"):
        _restore_digit_splitting(tokenizer)
    target.mkdir(parents=True)
    model.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)


def space_needed(gguf: Path) -> int:
    """Bytes that the converted folder takes at most. Raises BaseModelError.

    The header counts the weights; the size of the file says little, for it depends on the quantisation.
    """
    weights = sum(int(tensor.n_elements) for tensor in _reader(gguf).tensors)
    return BYTES_PER_WEIGHT * weights + BYTES_BESIDE


def _reader(gguf: Path) -> Any:
    from gguf import GGUFReader

    from fedclient.base_model import BaseModelError

    try:
        return GGUFReader(str(gguf))
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise BaseModelError(f"{gguf} is not a readable GGUF file: {error}") from None


def _check(gguf: Path) -> Any:
    """Refuse what cannot be read; the name of the file's pre-tokenizer, None where it has none."""
    from fedclient.base_model import BaseModelError

    reader = _reader(gguf)
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in SUPPORTED:
            raise BaseModelError(
                f"{gguf}: tensor {tensor.name!r} has the type {tensor.tensor_type.name}, which is"
                f" not supported; there are {', '.join(SUPPORTED)}"
            )
    field = reader.fields.get("tokenizer.ggml.pre")
    return None if field is None else field.contents()


def _forget_quantisation(model: Any) -> None:
    """transformers refuses to save what it believes is still quantised; it is float32 by now."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        model.quantization_method = None


def _restore_digit_splitting(tokenizer: Any) -> None:
    """SmolLM's tokenizer splits numbers into digits; the GGUF import loses that step."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
