import torch

def rademacher_(out: torch.Tensor, seed: int, tensor_id: int, first_element: int) -> None:
    """Write elements first_element, first_element + 1, ... of a Rademacher probe into `out`.

    `out` is a contiguous float32 tensor on the CPU, of any shape; else ValueError.
    """

def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Return the four words of Philox4x32-10 at `counter` under `key`."""

def available(isa: int) -> bool: ...

def sign_product_(
    out: torch.Tensor,
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor | None,
    add: torch.Tensor | None,
    coarse: bool,
    isa: int,
    threads: int,
) -> None:
    """Write x S * scale + add into `out`, for the sign matrix S [inner, columns] of `words`.

    out [rows, columns], x [rows, inner], add [rows, columns]: float32 or bfloat16, `add` as `out`;
    words: int32 (reference/sign_adapter.py); scale: float32 [columns]. All contiguous, on the CPU;
    else ValueError. `coarse` allows 16-bit fixed point.
    """

def sign_transpose_(out: torch.Tensor, words: torch.Tensor, isa: int, threads: int) -> None:
    """Write the words of a sign matrix's transpose into `out`."""

def sign_factors_(
    left: torch.Tensor,
    right: torch.Tensor,
    seeds: torch.Tensor,
    tensor_id: int,
    left_size: int,
    right_size: int,
    threads: int,
) -> None:
    """Write the words of U [K, left_size] and V transposed [right_size, K]; seeds: int64 [K]."""
