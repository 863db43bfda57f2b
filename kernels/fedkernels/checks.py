"""Checks of arguments: what is bad is a ValueError that names the argument, whatever its type."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import SupportsFloat, SupportsIndex

import torch


def whole_number(name: str, value: SupportsIndex, start: int, end: int) -> int:
    """Return `value` as a Python integer; ValueError unless it is a whole number in [start, end).

    NumPy's integers and tensors of one integer are whole numbers; 1.0 is not.
    """
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor that holds no value
        raise ValueError(f"{name} must be a whole number, and it is {value!r}") from None
    if not start <= number < end:
        raise ValueError(f"{name} must be in [{start}, {end}), and it is {number}")
    return number


def whole_numbers(
    name: str, values: Iterable[SupportsIndex] | torch.Tensor, start: int, end: int
) -> list[int]:
    """Return the values as Python integers; ValueError unless they are K >= 1 in [start, end)."""
    if isinstance(values, torch.Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.is_complex():
            raise ValueError(f"{name} must be a one-dimensional tensor of integers")
        if len(values) and values.dtype in (torch.int32, torch.int64):
            # One by one takes longer than a kernel that has thousands of them.
            for value in (int(values.min()), int(values.max())):
                whole_number(name, value, start, end)
            return list(map(int, values.tolist()))
    result = [whole_number(name, value, start, end) for value in listed(name, values)]
    if not result:
        raise ValueError(f"{name} must not be empty")
    return result


def sizes(name: str, shape: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Return a shape as Python integers; ValueError unless all are whole numbers from 0 on."""
    return tuple(whole_number(name, size, 0, 2**62) for size in listed(name, shape))


def listed(name: str, values: Iterable[SupportsIndex]) -> list[SupportsIndex]:
    """Return the values in a list; ValueError unless there are values to list."""
    try:
        return list(values)
    except TypeError:
        raise ValueError(f"{name} must be a list of whole numbers, not {values!r}") from None


def dense_tensor(name: str, value: torch.Tensor) -> torch.Tensor:
    """Return the tensor; ValueError unless it is one whose values lie in memory as they are."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, not {value.layout}")
    if value.is_neg() or value.is_conj():
        raise ValueError(f"{name} must not be a lazily negated or conjugated view")
    return value


def finite_float32(name: str, value: SupportsFloat) -> float:
    """Return `value` as a float; ValueError unless it is a number that float32 can hold."""
    try:
        if isinstance(value, str):  # float() would read it
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"{name} must be a finite number, and it is {value!r:.40}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, and it is {number}")
    if not math.isfinite(float32(number)):
        raise ValueError(f"{name} must fit float32, and it is {number}")
    return number


def float32(value: float) -> float:
    """Return `value` rounded to float32."""
    return torch.tensor(value, dtype=torch.float64).float().item()


def device_of(device: torch.device | str) -> torch.device:
    """Return the device; ValueError unless this machine has it and it holds values."""
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise ValueError("device must hold values, and meta holds none")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} is not available: {str(error)[:200]}") from None
    return found
