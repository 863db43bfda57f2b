// Matrices of four or eight bits a weight (fedkernels/quantized_tensor.py says what the codes mean).
#pragma once

#include <cstdint>

namespace fedkernels {

enum class ScaleType { float32, float16, nested };

// Rows of weights follow each other without a gap; the weights of a block share a scale, and a block
// may begin and end inside a row. value = table[code] * scale + minimum, each step rounded.
struct QuantizedMatrix {
  const std::uint8_t* codes;     // two to a byte, the first in the high bits; int8 without a table
  const float* table;            // [16], or null
  const void* scales;            // [blocks], of the type below
  const std::uint16_t* minimums;  // float16 [blocks], or null
  const float* nested_scales;    // [blocks / nested_block]
  const float* nested_code;      // [256]
  const float* nested_offset;    // [1]
  std::int64_t rows, columns, block, nested_block;
  ScaleType scale_type;
};

// `first` and `past` count weights from the start of the matrix, row by row, unless named otherwise.
struct QuantizedKernels {
  void (*to_float32)(const QuantizedMatrix& matrix, std::int64_t first, std::int64_t past, float* out);
  void (*to_bfloat16)(const QuantizedMatrix& matrix, std::int64_t first, std::int64_t past,
                      std::uint16_t* out);
  // Smallest and largest of each block.
  void (*range)(const float* values, std::int64_t count, float* low, float* high);
  // Codes of one block, from what torch made of its range; `count` values, `inverse` of the scale.
  void (*encode_table)(const float* values, std::int64_t count, const float* borders, float inverse,
                       std::uint8_t* codes);
  void (*encode_steps)(const float* values, std::int64_t count, float minimum, float inverse,
                       std::uint8_t* codes);
  void (*encode_int8)(const float* values, std::int64_t count, float inverse, std::int8_t* codes);
};

constexpr std::int64_t kFewRows = 32;  // what fits beside the weights in the first-level cache

// How a kernel wants the rows of x: as they are, but in float32; or with the 16 even ones of each 32
// columns first, then the odd ones, so that the two weights of a byte need not be brought together.
enum class InputLayout { float32, split_float32, split_bfloat16 };

struct FewRows {
  const void* x;  // [rows, stride], as `arrange` made it
  std::int64_t rows, stride;
  InputLayout layout;
  const float* bias;  // [rows of the matrix], or null
  void* y;            // [rows, rows of the matrix], float32 or bfloat16
  bool bfloat16;
};

struct QuantizedRowKernels {
  // What `multiply` wants of x, given its type.
  InputLayout (*layout)(const QuantizedMatrix& matrix, bool bfloat16);
  // x [rows, columns] in float32 or bfloat16 to that layout, rows padded with zeros to the stride, a
  // multiple of 16.
  void (*arrange)(const void* x, bool bfloat16, std::int64_t rows, std::int64_t columns,
                  std::int64_t stride, InputLayout layout, void* out);
  // y[:, first_feature .. past_feature), for at most kFewRows rows.
  void (*multiply)(const QuantizedMatrix& matrix, const FewRows& input, std::int64_t first_feature,
                   std::int64_t past_feature);
};

namespace portable {
extern const QuantizedKernels kQuantizedKernels;
extern const QuantizedRowKernels kQuantizedRowKernels;
}
namespace avx2 {
extern const QuantizedKernels kQuantizedKernels;
extern const QuantizedRowKernels kQuantizedRowKernels;
}
namespace avx512 {
extern const QuantizedKernels kQuantizedKernels;
extern const QuantizedRowKernels kQuantizedRowKernels;
}
namespace neon {
extern const QuantizedKernels kQuantizedKernels;
extern const QuantizedRowKernels kQuantizedRowKernels;
}
namespace avx512_bf16 {
extern const QuantizedRowKernels kQuantizedRowKernels;
}

}  // namespace fedkernels
