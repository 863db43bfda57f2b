import torch

def rademacher_(out: torch.Tensor, seed: int, tensor_id: int, first_element: int) -> None:
    """Write elements first_element, first_element + 1, ... of a Rademacher probe into `out`.

    `out` is a contiguous float32 tensor on the CPU, of any shape; else ValueError.
    """

def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Return the four words of Philox4x32-10 at `counter` under `key`."""

def available(isa: int) -> bool: ...
