"""How much each weight matters, or each row or column of weights in sum.

    magnitude       |W|
    wanda           |W_ij| ||x_j||_2                                (Sun et al., 2023)
    taylor          |W_ij dL/dW_ij|                                 (first order)
    lora_gradient   ((dB A + B dA − dB dA) ∘ (W + scale B A))²      (LoRAPrune, Zhang et al., 2023)

Structured pruning needs sums over whole rows and columns alone. They are taken over blocks of rows
that fit into a processor's cache, so that the scores of a large weight never exist as a whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedkernels.backends import instruction_set
from fedkernels.checks import dense_tensor, finite_float32
from fedkernels.reference import pruning as reference

SUMS = (None, "rows", "columns")

# Elements of a block: 2 MiB in float32, which caches hold.
ELEMENTS_AT_ONCE = 2**19


def magnitude(weight: Tensor, sums: str | None = None) -> Tensor:
    """Return the scores |W|.

    Args:
        weight: [out, in], any floating dtype; the scores are computed in float32.
        sums: None: float32 [out, in], every weight's score; "rows": float64 [out], each row's sum;
            "columns": float64 [in], each column's sum.

    Raises:
        ValueError: a tensor that is empty, not floating, on another device or of another shape
            than the weight asks for; an unknown `sums`.
    """
    _check_weight(weight)
    if _plain(sums):
        return _reduced(reference.magnitude(weight), sums)
    return _by_blocks(weight, sums, lambda rows: weight[rows].float().abs())


def wanda(weight: Tensor, input_norms: Tensor, sums: str | None = None) -> Tensor:
    """Return the scores |W_ij| ||x_j||; `input_norms` [in] as an `InputNorms` collects them.

    Other arguments, result and errors are those of `magnitude`.
    """
    _check_weight(weight)
    _check("input_norms", input_norms, weight, weight.shape[1:])
    if _plain(sums):
        return _reduced(reference.wanda(weight, input_norms), sums)
    norms = input_norms.float()
    return _by_blocks(weight, sums, lambda rows: weight[rows].float().abs().mul_(norms))


def taylor(weight: Tensor, gradient: Tensor, sums: str | None = None) -> Tensor:
    """Return the scores |W ∘ gradient|, both [out, in].

    Other arguments, result and errors are those of `magnitude`.
    """
    _check_weight(weight)
    _check("gradient", gradient, weight, weight.shape)
    if _plain(sums):
        return _reduced(reference.taylor(weight, gradient), sums)
    return _by_blocks(
        weight, sums, lambda rows: (weight[rows].float() * gradient[rows].float()).abs_()
    )


def lora_gradient(
    weight: Tensor,
    b: Tensor,
    a: Tensor,
    b_gradient: Tensor,
    a_gradient: Tensor,
    scale: float = 1.0,
    sums: str | None = None,
) -> Tensor:
    """Return LoRAPrune's scores from the gradients of an adapter, without one of the weight.

    Args:
        weight: [out, in], frozen.
        b, b_gradient: the adapter's B [out, r] and the loss's gradient of it.
        a, a_gradient: the adapter's A [r, in] and the loss's gradient of it.
        scale: of the adapter: the weight in use is W + scale B A.
        sums: as in `magnitude`, whose result and errors these are too.
    """
    _check_weight(weight)
    out, columns = weight.shape
    rank = b.shape[-1] if dense_tensor("b", b).dim() == 2 else 0
    for name, part, shape in (
        ("b", b, (out, rank)),
        ("a", a, (rank, columns)),
        ("b_gradient", b_gradient, (out, rank)),
        ("a_gradient", a_gradient, (rank, columns)),
    ):
        _check(name, part, weight, shape)
    scale = finite_float32("scale", scale)
    if _plain(sums):
        whole = reference.lora_gradient(weight, b, a, b_gradient, a_gradient, scale)
        return _reduced(whole, sums)
    # dB A + B dA − dB dA = [dB B] [A − dA; dA]: one product in place of three
    left = torch.cat([b_gradient.float(), b.float()], dim=1)
    right = torch.cat([a.float() - a_gradient.float(), a_gradient.float()])
    scaled = scale * b.float()

    def block(rows: slice) -> Tensor:
        merged = torch.addmm(weight[rows].float(), scaled[rows], a.float())
        return merged.mul_(left[rows] @ right).square_()

    return _by_blocks(weight, sums, block)


def moving_average(previous: Tensor | None, scores: Tensor, decay: float = 0.9) -> Tensor:
    """Return decay · previous + (1 − decay) · scores; `scores` themselves where nothing precedes.

    The scores of one batch are noisy: LoRAPrune averages them over its steps with decay 0.9.

    Raises:
        ValueError: `decay` is outside [0, 1), or the shapes differ.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), and it is {decay}")
    if previous is None:
        return scores.clone()
    if previous.shape != scores.shape:
        shapes = f"{list(previous.shape)} and scores {list(scores.shape)}"
        raise ValueError(f"previous {shapes} must have one shape")
    return torch.lerp(scores, previous, decay)


def _plain(sums: str | None) -> bool:
    """Check `sums`; whether the reference is to compute."""
    if sums not in SUMS:
        raise ValueError(f"sums must be None, 'rows' or 'columns', and it is {sums!r}")
    return instruction_set() is None


def _reduced(scores: Tensor, sums: str | None) -> Tensor:
    if sums is None:
        return scores
    return scores.sum(dim=1 if sums == "rows" else 0, dtype=torch.float64)


def _by_blocks(weight: Tensor, sums: str | None, block: Callable[[slice], Tensor]) -> Tensor:
    """Reduce or join the scores [rows, in] that `block` returns for a slice of rows."""
    out, columns = weight.shape
    step = max(1, ELEMENTS_AT_ONCE // columns)
    shape, dtype = {
        None: ((out, columns), torch.float32),
        "rows": ((out,), torch.float64),
        "columns": ((columns,), torch.float64),
    }[sums]
    result = torch.zeros(shape, dtype=dtype, device=weight.device)
    with torch.no_grad():
        for start in range(0, out, step):
            rows = slice(start, min(start + step, out))
            scores = block(rows)
            if sums is None:
                result[rows] = scores
            elif sums == "rows":
                result[rows] = scores.sum(dim=1)
            else:
                result += scores.sum(dim=0)
    return result


def _check_weight(weight: Tensor) -> None:
    dense_tensor("weight", weight)
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be a matrix with elements, and it is {list(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating, and it is {weight.dtype}")


def _check(name: str, part: Tensor, weight: Tensor, shape: tuple[int, ...]) -> None:
    dense_tensor(name, part)
    if part.shape != torch.Size(shape) or 0 in shape:
        expected = f"{list(shape)} for a weight {list(weight.shape)}"
        raise ValueError(f"{name} must be {expected}, and it is {list(part.shape)}")
    if not part.is_floating_point():
        raise ValueError(f"{name} must be floating, and it is {part.dtype}")
    if part.device != weight.device:
        raise ValueError(f"{name} is on {part.device}, and weight on {weight.device}")
