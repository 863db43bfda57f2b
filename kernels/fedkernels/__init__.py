"""The numerics of fedbraid: random probes, and the SVD of a stack of low-rank factors.

`reference.py` says what every probe is, slowly and plainly; the compiled backends agree with it
bit for bit. `stack_svd` is the one decomposition that the server needs.
"""

from __future__ import annotations

from fedkernels.backends import backend, backends, use_backend
from fedkernels.part import Part
from fedkernels.probes import PROBES, derive_seed, noise
from fedkernels.quantized import dequantize, linear, lora_linear, quantize
from fedkernels.quantized_linear import QuantizedLinear, quantize_linears
from fedkernels.quantized_tensor import QuantizedTensor
from fedkernels.replay import perturb_, perturbed, project, replay_
from fedkernels.sign_adapter import SignAdapter, sign_linear
from fedkernels.stack_svd import METHODS, stack_svd

__all__ = [
    "METHODS",
    "PROBES",
    "Part",
    "QuantizedLinear",
    "QuantizedTensor",
    "SignAdapter",
    "backend",
    "backends",
    "dequantize",
    "derive_seed",
    "linear",
    "lora_linear",
    "noise",
    "perturb_",
    "perturbed",
    "project",
    "quantize",
    "quantize_linears",
    "replay_",
    "sign_linear",
    "stack_svd",
    "use_backend",
]
