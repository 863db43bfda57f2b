"""The compiled kernels of quantised matrices: no bad argument reaches their pointers."""

from __future__ import annotations

import pytest
import torch

import fedkernels as fk
from fedkernels import _cpu
from fedkernels.backends import INSTRUCTION_SETS
from fedkernels.reference import quantized as reference

ISA = INSTRUCTION_SETS["portable"]
TENSOR = reference.quantize(torch.arange(5 * 70.0).reshape(5, 70), "nf4")
PARTS = {
    "codes": TENSOR.codes,
    "scales": TENSOR.scales,
    "minimums": None,
    "nested_scales": TENSOR.nested_scales,
    "nested_code": TENSOR.nested_code,
    "nested_offset": TENSOR.nested_offset,
    "table": TENSOR.table,
    "rows": 5,
    "columns": 70,
    "block": 64,
    "nested_block": 256,
}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"codes": TENSOR.codes[:-1]}, "codes"),
        ({"codes": TENSOR.codes.to(torch.int8)}, "codes"),
        ({"codes": TENSOR.codes.repeat(2)[::2]}, "codes"),
        ({"scales": TENSOR.scales[:-1]}, "scales"),
        ({"scales": TENSOR.scales.double()}, "scales"),
        ({"minimums": torch.zeros(6)}, "minimums"),
        ({"minimums": torch.zeros(5, dtype=torch.float16)}, "minimums"),
        ({"nested_scales": None}, "scales"),
        ({"nested_scales": torch.zeros(2)}, "nested_scales"),
        ({"nested_code": torch.zeros(255)}, "nested_code"),
        ({"nested_offset": torch.zeros(2)}, "nested_offset"),
        ({"table": torch.zeros(8)}, "table"),
        ({"block": 63}, "block"),
        ({"block": 0}, "block"),
        ({"nested_block": 0}, "block"),
        ({"rows": 0}, "shape"),
    ],
)
def test_parts_that_do_not_fit_make_no_matrix(changed, named):
    with pytest.raises(ValueError, match=named):
        _cpu.QuantizedMatrix(**(PARTS | changed))


@pytest.mark.parametrize(
    ("out", "row", "column", "named"),
    [
        (torch.zeros(5, 70, dtype=torch.float16), 0, 0, "out"),
        (torch.zeros(350), 0, 0, "out"),
        (torch.zeros(70, 5).T, 0, 0, "out"),
        (torch.zeros(5, 70), 1, 0, "first_row"),
        (torch.zeros(5, 70), -1, 0, "first_row"),
        (torch.zeros(5, 69), 0, 2, "first_column"),
        (torch.zeros(5, 69), 0, -1, "first_column"),
    ],
)
def test_a_part_outside_the_matrix_is_refused_untouched(out, row, column, named):
    with pytest.raises(ValueError, match=named):
        _cpu.dequantize_(out, _cpu.QuantizedMatrix(**PARTS), row, column, ISA, 1)
    assert not out.any()


@pytest.mark.parametrize("name", [name for name in INSTRUCTION_SETS if name in fk.backends()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_part_is_that_of_the_whole(name, dtype):
    whole = reference.dequantize(TENSOR).to(dtype)
    matrix = _cpu.QuantizedMatrix(**PARTS)
    for row, column, rows, columns in [(0, 0, 5, 70), (1, 3, 3, 67), (4, 69, 1, 1), (2, 0, 0, 9)]:
        out = torch.zeros(rows, columns, dtype=dtype)
        _cpu.dequantize_(out, matrix, row, column, INSTRUCTION_SETS[name], 2)
        assert torch.equal(out, whole[row : row + rows, column : column + columns])


@pytest.mark.parametrize(
    ("y", "x", "bias", "named"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 71), None, "x"),
        (torch.zeros(33, 5), torch.zeros(33, 70), None, "x"),
        (torch.zeros(0, 5), torch.zeros(0, 70), None, "x"),
        (torch.zeros(5), torch.zeros(70), None, "x"),
        (torch.zeros(2, 4), torch.zeros(2, 70), None, "y"),
        (torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(2, 70), None, "y"),
        (torch.zeros(2, 5).half(), torch.zeros(2, 70).half(), None, "x"),
        (torch.zeros(2, 5), torch.zeros(2, 70), torch.zeros(4), "bias"),
        (torch.zeros(2, 5), torch.zeros(2, 70), torch.zeros(5).double(), "bias"),
    ],
)
def test_rows_that_do_not_fit_are_refused(y, x, bias, named):
    with pytest.raises(ValueError, match=named):
        _cpu.quantized_few_rows_(y, x, _cpu.QuantizedMatrix(**PARTS), bias, ISA, 1)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"values": torch.zeros(128).double()}, "values"),
        ({"block": 0}, "block"),
        ({"block": 63}, "block|inverse"),
        ({"inverse": torch.zeros(1)}, "inverse"),
        ({"borders": torch.zeros(16)}, "borders"),
        ({"borders": None, "minimums": torch.zeros(3)}, "minimums"),
        ({"borders": None}, "codes"),
        ({"codes": torch.zeros(63, dtype=torch.uint8)}, "codes"),
        ({"codes": torch.zeros(64, dtype=torch.int8)}, "codes"),
    ],
)
def test_values_that_do_not_fit_get_no_codes(changed, named):
    arguments = {
        "values": torch.ones(128),
        "block": 64,
        "inverse": torch.ones(2),
        "borders": torch.linspace(-1, 1, 15),
        "minimums": None,
        "codes": torch.zeros(64, dtype=torch.uint8),
        "isa": ISA,
        "threads": 1,
    }
    with pytest.raises(ValueError, match=named):
        _cpu.quantize_codes_(**(arguments | changed))


def test_ranges_need_room_for_every_block():
    with pytest.raises(ValueError, match="low"):
        _cpu.block_ranges_(torch.zeros(65), 64, torch.zeros(1), torch.zeros(2), ISA, 1)
