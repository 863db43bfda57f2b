"""Weights of bitsandbytes and of GGUF files keep every bit of their values."""

from __future__ import annotations

import hashlib

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedkernels as fk
from fedkernels.quantized_tensor import NF4
from fedkernels.reference.quantized import dynamic_code

# Made by bitsandbytes 0.50.2 from a [3, 50] matrix: quantize_4bit(..., quant_type="nf4"), the digests
# from the bytes of dequantize_4bit. 150 weights are two blocks of 64 and one of 22.
NESTED = {
    "packed": "7947a6e17686b8a98b51ca67afe2c9f656597793688a37ab5f777687766777887777777777777777"
    "777777777777777777779b676dba2c2459a7e64057897f4878e3d463b027db6fa426b7",
    "absmax": [0, 207, 231],
    "nested_absmax": "e90b8340",
    "nested_offset": "e002d140",
    "sha256": "3c4be7aaac65cc8f8934b86c24c324a9a4181fa5947464cb4ec8ca4b060d98da",
}
PLAIN = {  # blocksize 32
    "packed": "7947a6e17686b8a98b51ca67afe2c9f656597793688b37bb5f7776878667778875a61e2da7244330"
    "8663f9169992d73577779b676dba2c2459a7e64057897f4878e3d463b027db6fa426b7",
    "absmax": "eeed1b4043980d408e5a4b3e7439fc40196c1441",
    "sha256": "3f6a738c43f82b548f0b6a015fe0baf7cef1c8b4e9be8ccfac0a30a84e39f618",
}
DYNAMIC_CODE = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def of_bytes(text: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def bitsandbytes_arguments(**changed):
    arguments = {
        "packed": of_bytes(NESTED["packed"], torch.uint8).reshape(-1, 1),
        "absmax": torch.tensor(NESTED["absmax"], dtype=torch.uint8),
        "code": torch.tensor(NF4),
        "blocksize": 64,
        "shape": torch.Size((3, 50)),
        "nested_absmax": of_bytes(NESTED["nested_absmax"], torch.float32),
        "nested_code": dynamic_code(),
        "nested_offset": of_bytes(NESTED["nested_offset"], torch.float32)[0],
    }
    return arguments | changed


def test_the_code_of_nested_scales_is_that_of_bitsandbytes():
    assert digest(dynamic_code()) == DYNAMIC_CODE


def test_nested_nf4_has_the_values_of_bitsandbytes(backend):
    tensor = fk.QuantizedTensor.from_bitsandbytes(**bitsandbytes_arguments())
    assert digest(tensor.dequantize()) == NESTED["sha256"]


def test_plain_nf4_has_the_values_of_bitsandbytes(backend):
    tensor = fk.QuantizedTensor.from_bitsandbytes(
        of_bytes(PLAIN["packed"], torch.uint8),
        of_bytes(PLAIN["absmax"], torch.float32),
        torch.tensor(NF4),
        32,
        (3, 50),
    )
    assert digest(tensor.dequantize()) == PLAIN["sha256"]


def test_whole_blocks_get_the_codes_of_bitsandbytes(backend):
    tensor = fk.quantize(torch.linspace(-2, 3, 128).reshape(2, 64), "nf4")
    assert tensor.codes.numpy().tobytes().hex() == (
        "00000000111111111111222222223333334444455555666667777888899999aa"
        "999aaaaaaabbbbbbbcccccccccddddddddddeeeeeeeeeeeeeeeeefffffffffff"
    )
    assert tensor.scales.tolist() == [0, 255]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"code": torch.tensor(NF4).flip(0)}, "code"),
        ({"code": torch.tensor(NF4)[:8]}, "code"),
        ({"packed": torch.zeros(75, dtype=torch.int8)}, "packed"),
        ({"packed": torch.zeros(74, dtype=torch.uint8)}, "codes"),
        ({"absmax": torch.zeros(2, dtype=torch.uint8)}, "scales"),
        ({"blocksize": 63}, "block"),
        ({"blocksize": 0}, "block"),
        ({"shape": (150,)}, "shape"),
        ({"shape": (3, 52)}, "codes"),
        ({"nested_absmax": torch.tensor([torch.nan])}, "nested_scales"),
        ({"nested_absmax": None}, "nested_scales"),
        ({"nested_code": torch.zeros(16)}, "nested_code"),
        ({"nested_offset": torch.inf}, "nested_offset"),
        ({"nested_blocksize": 0}, "nested_block"),
        ({"absmax": torch.zeros(3)}, "nested_scales"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_by_name(changed, named):
    with pytest.raises(ValueError, match=named):
        fk.QuantizedTensor.from_bitsandbytes(**bitsandbytes_arguments(**changed))


@given(
    name=st.sampled_from(["Q4_0", "Q4_1", "Q8_0"]),
    rows=st.integers(1, 4),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_gguf_blocks_have_the_values_of_the_gguf_package(name, rows, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 32 * blocks, generator=generator).exp().sub(1)
    kind = gguf.GGMLQuantizationType[name]
    packed = gguf.quants.quantize(weight.numpy(), kind)
    expected = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    for imported in (kind, name):
        tensor = fk.QuantizedTensor.from_gguf(torch.from_numpy(packed), imported)
        assert tensor.shape == (rows, 32 * blocks)
        assert tensor.nbytes == packed.nbytes
        assert torch.equal(tensor.dequantize(), expected)


@pytest.mark.parametrize(
    ("blocks", "type", "named"),
    [
        (torch.zeros(2, 18, dtype=torch.uint8), "Q6_K", "type"),
        (torch.zeros(2, 19, dtype=torch.uint8), "Q4_0", "blocks"),
        (torch.zeros(2, 18, dtype=torch.int8), "Q4_0", "blocks"),
        (torch.zeros(18, dtype=torch.uint8), "Q4_0", "blocks"),
        (torch.zeros(0, 18, dtype=torch.uint8), "Q4_0", "blocks"),
        (torch.full((2, 18), 255, dtype=torch.uint8), "Q4_0", "scales"),  # NaN in float16
    ],
)
def test_what_is_no_tensor_of_these_types_is_refused(blocks, type, named):
    with pytest.raises(ValueError, match=named):
        fk.QuantizedTensor.from_gguf(blocks, type)
