"""Exact sums of real numbers: fixed point, so that the order and the grouping of terms never matter.

A number is a sum of digits times powers of 2**32, from 2**-160 up to 2**128, each digit in
[-2**31, 2**31): every number has one such form, which two sums of the same terms share whatever was
added to what first. A term is cut once, to a multiple of 2**-160; nothing is rounded afterwards until
``float64`` makes one number of the digits, by one order of operations.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

DIGIT_BITS = 32
DIGITS = 9
LOWEST = -160  # a power of two: the unit of the last digit
MANTISSA_BITS = 53
# Of a term's absolute value: more than the gate's largest norm times its largest weight. Sums of 2**38
# such terms fit.
LARGEST_TERM = 2.0**88
_BASE = 1 << DIGIT_BITS


@dataclass(frozen=True, eq=False)
class ExactNumbers:
    """``digits``: int64 [DIGITS, n], the lowest first."""

    digits: Tensor

    @classmethod
    def of(cls, values: Tensor) -> ExactNumbers:
        """Terms: float64 [n], finite, at most LARGEST_TERM in size. Raises ValueError for others."""
        if values.ndim != 1 or not bool((values.abs() <= LARGEST_TERM).all()):
            raise ValueError(f"terms must be one vector of numbers within {LARGEST_TERM:g}")
        mantissa, exponent = torch.frexp(values.double())
        whole = (mantissa * 2.0**MANTISSA_BITS).to(torch.int64)
        sign, size = whole.sign(), whole.abs()
        place = exponent.to(torch.int64) - MANTISSA_BITS - LOWEST
        size = size >> (-place).clamp(0, MANTISSA_BITS + 1)
        place = place.clamp_min(0)
        first, shift = place // DIGIT_BITS, place % DIGIT_BITS
        low = (size & (_BASE - 1)) << shift
        high = ((size >> DIGIT_BITS) << shift) + (low >> DIGIT_BITS)
        digits = torch.zeros(DIGITS, len(values), dtype=torch.int64)
        for offset, digit in enumerate((low & (_BASE - 1), high & (_BASE - 1), high >> DIGIT_BITS)):
            digits.scatter_add_(0, (first + offset)[None], (sign * digit)[None])
        return cls(_carried(digits))

    @classmethod
    def from_wire(cls, digits: Tensor, lowest: int) -> ExactNumbers:
        """What ``wire`` gave. Raises ValueError for digits that are none."""
        # A matrix without rows may have any number of columns, and takes no bytes on the wire.
        if digits.dtype != torch.int32 or digits.ndim != 2 or len(digits) < 1:
            raise ValueError("digits are an int32 matrix of one row, at least")
        if not 0 <= lowest <= DIGITS - len(digits):
            raise ValueError(f"{len(digits)} digits from place {lowest} on are not within {DIGITS}")
        whole = torch.zeros(DIGITS, digits.shape[1], dtype=torch.int64)
        whole[lowest : lowest + len(digits)] = digits
        return cls(whole)

    def wire(self) -> tuple[Tensor, int]:
        """The digits without the places where all are 0, int32 [places, n], and the first place."""
        used = self.digits.ne(0).any(dim=1).nonzero()[:, 0].tolist() or [0]
        return self.digits[used[0] : used[-1] + 1].to(torch.int32), used[0]

    @classmethod
    def sum(cls, parts: Iterable[ExactNumbers]) -> ExactNumbers:
        """The sum of numbers of one length, at least one vector and fewer than 2**30."""
        digits = functools.reduce(operator.add, (part.digits for part in parts))
        return cls(_carried(digits))

    def __add__(self, other: ExactNumbers) -> ExactNumbers:
        return ExactNumbers.sum([self, other])

    def at(self, places: Tensor, count: int) -> ExactNumbers:
        """The numbers at ``places`` (int64 [n], each once) among ``count``; the others are 0."""
        digits = torch.zeros(DIGITS, count, dtype=torch.int64)
        digits[:, places] = self.digits
        return ExactNumbers(digits)

    def float64(self) -> Tensor:
        """The numbers, float64 [n]: within 2**-52 of the exact ones, and the same on any machine."""
        total = torch.zeros(self.digits.shape[1], dtype=torch.float64)
        for place, digits in enumerate(self.digits):
            if not bool(digits.any()):
                continue  # Most places are empty, and passes over them are what this costs.
            total = total + digits.double() * 2.0 ** (LOWEST + DIGIT_BITS * place)
        return total

    def __len__(self) -> int:
        return self.digits.shape[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExactNumbers) and torch.equal(self.digits, other.digits)

    __hash__ = None  # type: ignore[assignment]


def _carried(digits: Tensor) -> Tensor:
    """Digits of sums (below 2**62 in size) as digits in [-2**31, 2**31)."""
    found = digits.clone()
    for place in range(DIGITS - 1):
        if not bool(found[place].any()):
            continue
        carry = (found[place] + (_BASE >> 1)) >> DIGIT_BITS
        found[place] -= carry << DIGIT_BITS
        found[place + 1] += carry
    return found
