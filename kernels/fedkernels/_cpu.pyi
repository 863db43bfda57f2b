import torch

def perturb(
    out: torch.Tensor,
    weight: torch.Tensor | None,
    pieces: torch.Tensor,
    gather: torch.Tensor | None,
    width: int,
    seed: int,
    tensor_id: int,
    probe: int,
    step: float,
    isa: int,
    threads: int,
) -> None:
    """Write fma(q, step, weight) into `out`; weight None is zero, and may be `out`.

    `pieces` and `gather` are those of `fedkernels.part.Part.pieces`, `width` its columns.
    """

def replay(
    weight: torch.Tensor,
    pieces: torch.Tensor,
    gather: torch.Tensor | None,
    width: int,
    seeds: torch.Tensor,
    coefficients: torch.Tensor,
    factor: float,
    tensor_id: int,
    probe: int,
    isa: int,
    threads: int,
) -> None:
    """Add factor * sum_k coefficients[k] q_k to the weight, with one rounding.

    seeds int64 [K] (the bits of 64-bit seeds), coefficients int32 [K].
    """

def project(
    out: torch.Tensor,
    delta: torch.Tensor,
    pieces: torch.Tensor,
    gather: torch.Tensor | None,
    width: int,
    seeds: torch.Tensor,
    tensor_id: int,
    probe: int,
    isa: int,
    threads: int,
) -> None:
    """Write <delta, q_k> of each seed into `out`, float64 [K]."""

def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Return the four words of Philox4x32-10 at `counter` under `key`."""

def available(isa: int) -> bool: ...
