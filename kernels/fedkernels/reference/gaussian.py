"""The truth about Gaussian probes: Box and Muller's map in float32, the same bits everywhere.

Two words of 32 bits give two normal values (Box and Muller, 1958). A mathematical library would
round its logarithm and cosine as it likes, so both are polynomials here, and every operation is one
that IEEE 754 rounds in one way only: *, fma, square root, conversion of an integer.

    radius    u = (first >> 1 | 1) / 2**31, in (0, 1], rounded to float32; r = sqrt(-2 ln u).
              With u = 2**e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)):
              -2 ln u = fma(f, LOG(f), e * MINUS_2_LN_2). The largest radius is 6.556.
    angle     x = (bits 5 to 29 of second as a signed integer, the lowest set) / 2**25, in
              (-1/2, 1/2): a quarter of the circle, cos(pi x / 2) = COS(x * x) and
              sin(pi x / 2) = x * SIN(x * x).
              Bit 31 of second negates the cosine, bit 30 swaps the two: the other three quarters.
    values    r * cosine, r * sine (after the swap).

The polynomials are minimax fits in Horner's form by fma; a value is within 3e-7, relatively, of the
exact map's.
"""

from __future__ import annotations

import torch

from fedkernels.reference.fma import fma


def _float32(*digits: str) -> tuple[float, ...]:
    return tuple(float.fromhex(number) for number in digits)


# Coefficients, lowest power first; each is a float32.
# -2 ln(1 + f) / f for f in [sqrt(1/2) - 1, sqrt(2) - 1]
LOG = _float32(
    "-0x1.fffffep+0",
    "0x1.00007ap+0",
    "-0x1.5559dcp-1",
    "0x1.ff623cp-2",
    "-0x1.978e38p-2",
    "0x1.614c20p-2",
    "-0x1.4c3cc0p-2",
    "0x1.9df91ap-3",
)
# cos(pi x / 2) and sin(pi x / 2) / x as polynomials in x**2, for x in (-1/2, 1/2)
COS = _float32("0x1.fffffep-1", "-0x1.3bd38cp+0", "0x1.03ae64p-2", "-0x1.4e35dap-6")
SIN = _float32("0x1.921fb6p+0", "-0x1.4abbbap-1", "0x1.465e92p-4", "-0x1.2d9302p-8")
(MINUS_2_LN_2,) = _float32("-0x1.62e430p+0")

SQRT_HALF_BITS = 0x3F3504F3  # the bits of the float32 next to sqrt(1/2)


def gaussian_pair(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two standard normal float32 tensors from two int64 tensors of 32-bit words."""
    radius = _square_root(_minus_2_log(first >> 1 | 1))
    x = _signed_angle(second).float() * 2.0**-25
    square = x * x
    cosine = _polynomial(COS, square) * (1 - 2 * (second >> 31)).float()
    sine = x * _polynomial(SIN, square)
    swap = (second >> 30 & 1).bool()
    return (
        radius * torch.where(swap, sine, cosine),
        radius * torch.where(swap, cosine, sine),
    )


def _minus_2_log(word: torch.Tensor) -> torch.Tensor:
    """Return float32 -2 ln(word / 2**31) of odd integers in (0, 2**31)."""
    bits = word.float().view(torch.int32)  # rounded to nearest even
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0  # exact
    return fma(f, _polynomial(LOG, f), (exponent - 31).float() * MINUS_2_LN_2)


def _signed_angle(word: torch.Tensor) -> torch.Tensor:
    """Return bits 5 to 29 of the word as a signed odd integer in (-2**24, 2**24)."""
    low = word >> 5 & 0x1FFFFFF
    return (low - ((low >> 24) << 25)) | 1


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    constants = torch.tensor(coefficients, dtype=torch.float32, device=x.device)
    value = constants[-1].expand_as(x)
    for constant in constants[:-1].flip(0):
        value = fma(value, x, constant)
    return value


def _square_root(x: torch.Tensor) -> torch.Tensor:
    # float64 has more than twice the digits of float32, so its own rounding is harmless
    return x.double().sqrt().float()
