"""GGUF files to a Hugging Face folder: dequantised once, in float32, so that nothing is rounded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

SUPPORTED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
             "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # fmt: skip


def convert(gguf: Path, target: Path) -> None:
    """Write ``target`` as a model folder. Raises BaseModelError for files that cannot be read."""
    from fedclient.base_model import BaseModelError

    # transformers and gguf draw bars of their own over ours; tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    _check_types(gguf)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BaseModelError(f"{gguf}: cannot be converted: {first}") from None
    _forget_quantisation(model)
    _restore_digit_splitting(tokenizer, gguf)
    target.mkdir(parents=True)
    model.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)


def _check_types(gguf: Path) -> None:
    from gguf import GGUFReader

    from fedclient.base_model import BaseModelError

    try:
        reader = GGUFReader(str(gguf))
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise BaseModelError(f"{gguf} is not a readable GGUF file: {error}") from None
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in SUPPORTED:
            raise BaseModelError(
                f"{gguf}: tensor {tensor.name!r} has the type {tensor.tensor_type.name}, which is"
                f" not supported; there are {', '.join(SUPPORTED)}"
            )


def _forget_quantisation(model: Any) -> None:
    """transformers refuses to save what it believes is still quantised; it is float32 by now."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        model.quantization_method = None


def _restore_digit_splitting(tokenizer: Any, gguf: Path) -> None:
    """SmolLM's tokenizer splits numbers into digits; the GGUF import loses that step."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(str(gguf)).fields.get("tokenizer.ggml.pre")
    if field is None or field.contents() not in ("smollm", "smollm2"):
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
