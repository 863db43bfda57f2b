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

# The training step's kernels; see cpu/training.h. Tensors are contiguous, on the CPU, float32 or all
# bfloat16 but for those named as float32; else ValueError. Results are written into the first ones.

def rms_norm(
    y: torch.Tensor,
    rstd: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    isa: int,
    threads: int,
) -> None:
    """x, y [rows, n]; rstd float32 [rows]."""

def rms_norm_backward(
    dx: torch.Tensor,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    isa: int,
    threads: int,
) -> None: ...
def swiglu(
    y: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, isa: int, threads: int
) -> None: ...
def swiglu_backward(
    dgate: torch.Tensor,
    dup: torch.Tensor,
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    isa: int,
    threads: int,
) -> None: ...
def cross_entropy_(
    logits: torch.Tensor,
    loss: torch.Tensor,
    best: torch.Tensor,
    labels: torch.Tensor,
    gradient: bool,
    isa: int,
    threads: int,
) -> None:
    """logits [rows, n]: softmax - onehot afterwards if `gradient`; loss float32; best, labels int64."""

def low_rank_project(
    h: torch.Tensor, x: torch.Tensor, across: torch.Tensor, isa: int, threads: int
) -> None:
    """h = x across; h float32 [rows, rank], across float32 [n, rank]."""

def low_rank_expand_(
    y: torch.Tensor,
    h: torch.Tensor,
    first_column: int,
    factor: torch.Tensor,
    isa: int,
    threads: int,
) -> None:
    """y += h[:, first_column :] factor; h float32, factor float32 [rank, n]."""

def low_rank_outer(
    out: torch.Tensor,
    h: torch.Tensor,
    first_column: int,
    x: torch.Tensor,
    isa: int,
    threads: int,
) -> None:
    """out = h[:, first_column :]ᵀ x; out float32 [rank, n], h float32."""

def attention(
    out: torch.Tensor,
    log_sums: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    isa: int,
    threads: int,
) -> None:
    """log_sums float32 [batch, heads, length]; mask uint8 [batch or 1, length, length]."""

def attention_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dout: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    isa: int,
    threads: int,
) -> None: ...
