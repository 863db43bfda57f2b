"""The sign adapter: a weighted sum of rank-1 probes beside a linear layer, its factors kept as bits.

A sum over K seeds, dW = sum_k a_k u_k v_k^T = U^T diag(a) V, has full rank and would be as large as
the weight itself. As U [K, out] and V [K, in] are signs, it takes K (out + in) / 8 bytes, exactly,
and is applied as y += ((x V^T) * a) U without ever being unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fedkernels.autograd import reshaped
from fedkernels.backends import instruction_set, threads, uses_triton
from fedkernels.checks import dense_tensor, sizes, whole_number, whole_numbers
from fedkernels.reference import sign_adapter as reference

DTYPES = (torch.float32, torch.bfloat16)
MOST_ELEMENTS = 2**39  # of a factor: four words of 2**32 blocks


@dataclass(frozen=True, eq=False)
class SignAdapter:
    """A change of a weight [out, in]: sum_k coefficients[k] * u_k v_k^T over K rank-1 probes.

    Attributes:
        left: bits of U [K, out], as int32 words [ceil(K / 32), 32 ceil(out / 32)]; bit k % 32 of
            word [k // 32, i] is set where u_k[i] = -1.
        right: bits of V transposed, [in, K], in the same form.
        coefficients: float32 [K]; may require a gradient.
        out_features, in_features: sizes of the weight as a matrix.
    """

    left: torch.Tensor
    right: torch.Tensor
    coefficients: torch.Tensor
    out_features: int
    in_features: int

    @classmethod
    def from_seeds(
        cls,
        seeds: Sequence[int],
        coefficients: torch.Tensor,
        tensor_id: int,
        shape: Sequence[int],
        exponent: int = 0,
    ) -> SignAdapter:
        """Return the adapter of the change 2**exponent * sum_k coefficients[k] z_k.

        Args:
            seeds: K seeds in [0, 2**64), K > 0.
            coefficients: float32 or int32 [K], finite, on the CPU or the GPU on which the adapter
                is to work. With exponent 0, float32 coefficients are kept as they are, so that a
                gradient reaches them.
            tensor_id: position of the tensor in its layout, in [0, 2**64 - 1).
            shape: sizes of the weight, [out, ...]: two or more, all positive.
            exponent: of the power of two that multiplies the coefficients.

        Raises:
            ValueError: an argument is none of these, or a product overflows float32.
        """
        out_features, in_features = _matrix_sizes(shape)
        seeds = whole_numbers("seeds", seeds, 0, 2**64)
        tensor_id = whole_number("tensor_id", tensor_id, 0, 2**64 - 1)
        scaled = _scaled(coefficients, exponent, len(seeds))
        if uses_triton(scaled.device):
            from fedkernels.gpu import sign_adapter as gpu

            left, right = gpu.factors(seeds, tensor_id, out_features, in_features, scaled.device)
        elif instruction_set() is None or scaled.device.type != "cpu":
            words = reference.factors(seeds, tensor_id, out_features, in_features)
            left, right = (factor.to(scaled.device) for factor in words)
        else:
            from fedkernels import _cpu

            left = _empty_words(len(seeds), out_features)
            right = _empty_words(in_features, len(seeds))
            # uint64 seeds travel in int64, which all of torch understands
            keys = torch.tensor([seed - (seed >> 63 << 64) for seed in seeds], dtype=torch.int64)
            _cpu.sign_factors_(left, right, keys, tensor_id, out_features, in_features, threads())
        return cls(left, right, scaled, out_features, in_features)

    def __call__(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Return `sign_linear(x, self, y)`."""
        return sign_linear(x, self, y)

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add `sign_linear(x, self)` to y in place, and return y; not differentiable.

        Arguments and errors are those of `sign_linear`; y is contiguous.
        """
        _check_pair(x, self, y)
        coarse = x.dtype == torch.bfloat16
        rows, base = (t.detach().view(-1, t.shape[-1]) for t in (x, y))
        a = self.coefficients.detach()
        inner = _product(rows, self.right, len(a), coarse, scale=a)
        _product(inner, self.left, self.out_features, coarse, add=base, dtype=y.dtype, out=base)
        return y

    @property
    def nbytes(self) -> int:
        """Bytes of the bits and the coefficients."""
        return self.left.nbytes + self.right.nbytes + self.coefficients.nbytes

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return U [K, out] and V [K, in] unpacked: float32, 32 times as large."""
        count = len(self.coefficients)
        u = reference.signs(self.left, count, self.out_features)
        return u, reference.signs(self.right, self.in_features, count).T

    def dense(self) -> torch.Tensor:
        """Return the whole change: float32 [out, in]."""
        u, v = self.factors()
        return (u.T * self.coefficients) @ v


def sign_linear(
    x: torch.Tensor, adapter: SignAdapter, y: torch.Tensor | None = None
) -> torch.Tensor:
    """Return y + ((x V^T) * a) U, or without y the product alone: [..., out], of x's dtype.

    Differentiable once in x, y and the coefficients a. Sums are float32 for float32 x: the compiled
    backends all give the same bits, within rounding of the dense product. For bfloat16 x, AVX-512
    with VNNI sums in 16-bit fixed point (cpu/sign_adapter_vnni.cc), well within bfloat16's rounding.

    Args:
        x: float32 or bfloat16 [..., in], contiguous, not empty, on the adapter's device.
        adapter: the change of the layer's weight.
        y: what the change is added to, such as the layer's own output; dtype and rows of x.

    Raises:
        ValueError: x or y is none of these.
    """
    _check_pair(x, adapter, y)
    result: torch.Tensor = _SignLinear.apply(x, adapter.coefficients, y, adapter)  # type: ignore[no-untyped-call]
    return result


class _SignLinear(torch.autograd.Function):
    """y + ((x V^T) * a) U. With q = dy U^T: dx = (q * a) V, da = sum over rows of (x V^T) * q."""

    @staticmethod
    def forward(
        context: Any,
        x: torch.Tensor,
        coefficients: torch.Tensor,
        y: torch.Tensor | None,
        adapter: SignAdapter,
    ) -> torch.Tensor:
        context.adapter = adapter
        context.save_for_backward(x if coefficients.requires_grad else None, coefficients)
        context.x_shape = x.shape
        coarse = x.dtype == torch.bfloat16
        rows = x.detach().reshape(-1, adapter.in_features)
        base = None if y is None else y.detach().reshape(-1, adapter.out_features)
        a = coefficients.detach()
        inner = _product(rows, adapter.right, len(a), coarse, scale=a)
        out = _product(inner, adapter.left, adapter.out_features, coarse, add=base, dtype=x.dtype)
        return reshaped(out, (*x.shape[:-1], adapter.out_features))

    @staticmethod
    @once_differentiable  # type: ignore[misc, no-untyped-call, unused-ignore]
    def backward(
        context: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        adapter: SignAdapter = context.adapter
        x, coefficients = context.saved_tensors
        for_x, for_coefficients, for_y, _ = context.needs_input_grad
        dx = da = None
        coarse = gradient.dtype == torch.bfloat16
        if for_x or for_coefficients:
            rows = gradient.detach().reshape(-1, adapter.out_features).contiguous()
            a = coefficients.detach()
            q = _product(rows, _transposed(adapter.left), len(a), coarse)
            if for_coefficients:
                inputs = x.detach().reshape(-1, adapter.in_features)
                da = (_product(inputs, adapter.right, len(a), coarse) * q).sum(0)
            if for_x:
                dx = _product(
                    q.mul_(a),
                    _transposed(adapter.right),
                    adapter.in_features,
                    coarse,
                    dtype=gradient.dtype,
                ).reshape(context.x_shape)
        return dx, da, gradient if for_y else None, None


def _product(
    x: torch.Tensor,
    words: torch.Tensor,
    columns: int,
    coarse: bool,
    scale: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x S * scale + add, in `out` (of `dtype`, may be `add`) if there is one.

    `coarse` allows the precision that bfloat16 needs.
    """
    isa = instruction_set()
    if uses_triton(x.device):
        from fedkernels.gpu import sign_adapter as gpu

        made = gpu.product(x, words, columns, scale, add, dtype, coarse)
        return made if out is None else out.copy_(made)
    if isa is None or x.device.type != "cpu":
        made = reference.product(x, words, columns, scale, add, dtype)
        return made if out is None else out.copy_(made)
    from fedkernels import _cpu

    if out is None:
        out = torch.empty(len(x), columns, dtype=dtype)
    _cpu.sign_product_(out, x, words, scale, add, coarse, isa, threads())
    return out


def _transposed(words: torch.Tensor) -> torch.Tensor:
    if uses_triton(words.device):
        from fedkernels.gpu import sign_adapter as gpu

        return gpu.transpose(words)
    isa = instruction_set()
    if isa is None or words.device.type != "cpu":
        return reference.transpose(words)
    from fedkernels import _cpu

    rows, columns = words.shape
    out = _empty_words(columns, reference.BITS * rows)
    _cpu.sign_transpose_(out, words, isa, threads())
    return out


def _empty_words(inner: int, columns: int) -> torch.Tensor:
    bits = reference.BITS
    return torch.empty(-(-inner // bits), -(-columns // bits) * bits, dtype=torch.int32)


def _matrix_sizes(shape: Sequence[int]) -> tuple[int, int]:
    shape = sizes("shape", shape)
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"shape must have two or more positive sizes, and it is {shape}")
    out_features, in_features = shape[0], math.prod(shape[1:])
    if max(out_features, in_features) > MOST_ELEMENTS:
        raise ValueError(f"shape {shape} has factors of more than {MOST_ELEMENTS} elements")
    return out_features, in_features


def _scaled(coefficients: torch.Tensor, exponent: int, count: int) -> torch.Tensor:
    """Return coefficients * 2**exponent, rounded once to float32."""
    if not isinstance(coefficients, torch.Tensor):
        raise ValueError(f"coefficients must be a tensor, not {type(coefficients).__name__}")
    if coefficients.dtype not in (torch.float32, torch.int32):
        raise ValueError(f"coefficients must be float32 or int32, not {coefficients.dtype}")
    if coefficients.device.type not in ("cpu", "cuda"):
        raise ValueError(f"coefficients must be on the CPU or a GPU, not on {coefficients.device}")
    if coefficients.shape != (count,):
        raise ValueError(
            f"coefficients must be [{count}], one a seed, and are {list(coefficients.shape)}"
        )
    if not coefficients.is_contiguous():
        raise ValueError("coefficients must be contiguous")
    exponent = whole_number("exponent", exponent, -1100, 1001)
    if coefficients.dtype == torch.float32 and exponent == 0:
        scaled = coefficients
    else:
        scaled = torch.ldexp(coefficients.double(), torch.tensor(exponent)).float()
    if not scaled.detach().isfinite().all():
        raise ValueError("coefficients times 2**exponent must be finite in float32")
    return scaled


def _check_pair(x: torch.Tensor, adapter: SignAdapter, y: torch.Tensor | None) -> None:
    _check_tensor("x", x, adapter.in_features, adapter.left.device)
    if y is None:
        return
    _check_tensor("y", y, adapter.out_features, x.device)
    if y.dtype != x.dtype or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"y must have the dtype and the rows of x, {x.dtype} {tuple(x.shape[:-1])}, "
            f"and it is {y.dtype} {tuple(y.shape)}"
        )


def _check_tensor(name: str, tensor: torch.Tensor, features: int, device: torch.device) -> None:
    dense_tensor(name, tensor)
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32 or bfloat16, not {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, not on {tensor.device}")
    if tensor.dim() == 0 or tensor.shape[-1] != features:
        raise ValueError(f"{name} must be [..., {features}], and it is {list(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, and it is {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
