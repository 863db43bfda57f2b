"""Which tensors the compiled training kernels take, and what is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkernels.backends import instruction_set
from fedkernels.checks import dense_tensor

COMPILED_DTYPES = (torch.float32, torch.bfloat16)


def compiled_for(*tensors: Tensor) -> int | None:
    """The instruction set that can take these tensors as they are, or None: use the reference."""
    dtype = tensors[0].dtype
    fits = dtype in COMPILED_DTYPES and all(
        tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors
    )
    return instruction_set() if fits else None


def check_floating(name: str, tensor: Tensor, dimensions: int | None = None) -> None:
    """Raise ValueError unless `tensor` is floating, not empty, and of so many dimensions."""
    dense_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must have a floating dtype, not {tensor.dtype}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty: its shape is {tuple(tensor.shape)}")
    if dimensions is not None and tensor.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, not {tensor.ndim}")


def check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both have one dtype and one device."""
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, but {other_name} is"
            f" {other.dtype} on {other.device}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, not {tuple(tensor.shape)}")
