"""The numerics of fedbraid: random probes, pruning, and the SVD of a stack of low-rank factors.

`reference.py` says what every probe is, slowly and plainly; the compiled backends agree with it
bit for bit. `stack_svd` is the one decomposition that the server needs.
"""

from __future__ import annotations

from fedkernels import pruning
from fedkernels.backends import backend, backends, use_backend
from fedkernels.part import Part
from fedkernels.probes import PROBES, derive_seed, noise
from fedkernels.quantized import dequantize, linear, lora_linear, quantize
from fedkernels.quantized_embedding import QuantizedEmbedding, quantize_embeddings
from fedkernels.quantized_linear import QuantizedLinear, quantize_linears
from fedkernels.quantized_tensor import QuantizedTensor
from fedkernels.replay import perturb_, perturbed, project, replay_
from fedkernels.sign_adapter import SignAdapter, sign_linear
from fedkernels.stack_svd import METHODS, stack_svd
from fedkernels.training.acceleration import Acceleration, accelerate, accelerated, restore
from fedkernels.training.adapted_linear import AdaptedLinear, Factor, adapted_linears
from fedkernels.training.attention import attention
from fedkernels.training.loss import (
    Loss,
    body_and_head,
    causal_loss,
    cross_entropy,
    logit_losses,
)
from fedkernels.training.rows import rms_norm, swiglu

__all__ = [
    "METHODS",
    "PROBES",
    "Acceleration",
    "AdaptedLinear",
    "Factor",
    "Loss",
    "Part",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedTensor",
    "SignAdapter",
    "accelerate",
    "accelerated",
    "adapted_linears",
    "attention",
    "backend",
    "backends",
    "body_and_head",
    "causal_loss",
    "cross_entropy",
    "dequantize",
    "derive_seed",
    "linear",
    "logit_losses",
    "lora_linear",
    "noise",
    "perturb_",
    "perturbed",
    "project",
    "pruning",
    "quantize",
    "quantize_embeddings",
    "quantize_linears",
    "replay_",
    "restore",
    "rms_norm",
    "sign_linear",
    "stack_svd",
    "swiglu",
    "use_backend",
]
