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

class QuantizedMatrix:
    """The parts of a `QuantizedTensor` on the CPU, checked; it shares their memory."""

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        minimums: torch.Tensor | None,
        nested_scales: torch.Tensor | None,
        nested_code: torch.Tensor | None,
        nested_offset: torch.Tensor | None,
        table: torch.Tensor | None,
        rows: int,
        columns: int,
        block: int,
        nested_block: int,
    ) -> None: ...

def dequantize_(
    out: torch.Tensor,
    matrix: QuantizedMatrix,
    first_row: int,
    first_column: int,
    isa: int,
    threads: int,
) -> None:
    """Write the part of `matrix` that begins at (first_row, first_column) into `out`.

    `out` is a contiguous float32 or bfloat16 matrix; else ValueError.
    """

def quantized_few_rows_(
    y: torch.Tensor,
    x: torch.Tensor,
    matrix: QuantizedMatrix,
    bias: torch.Tensor | None,
    isa: int,
    threads: int,
) -> None:
    """Write x Wᵀ + bias into `y`, for 1 to 32 rows.

    `x` and `y` are both float32 or both bfloat16, `bias` is float32.
    """

def block_ranges_(
    values: torch.Tensor,
    block: int,
    low: torch.Tensor,
    high: torch.Tensor,
    isa: int,
    threads: int,
) -> None:
    """Write the smallest and the largest value of each block; all tensors are float32."""

def quantize_codes_(
    values: torch.Tensor,
    block: int,
    inverse: torch.Tensor,
    borders: torch.Tensor | None,
    minimums: torch.Tensor | None,
    codes: torch.Tensor,
    isa: int,
    threads: int,
) -> None:
    """Write the code of each value, which is first multiplied by its block's `inverse` scale.

    With `borders` [15]: how many lie below it. With `minimums`: how many steps above its block's
    minimum it is, 0 .. 15. Both packed into uint8. With neither: the nearest int8.
    """
