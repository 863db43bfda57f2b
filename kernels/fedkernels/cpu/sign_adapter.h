// Products with a matrix of signs that is kept as bits, the building block of the sign adapter.
//
// A sign matrix S [inner, columns] lies in words of 32 bits, `stride` words a row: bit i % 32 of
// word [i / 32, j] is set where S[i, j] = -1. The stride is a multiple of 32, so that a kernel reads
// whole vectors at the end of a row and a transposed matrix has the same form; bits outside of the
// matrix may have any value.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedkernels {

enum class FloatType { float32, bfloat16 };

// out[r, j] = (sum_i x[r, i] S[i, j]) * scale[j] + add[r, j]; row-major without gaps.
struct SignProduct {
  const void* x;  // [rows, inner]
  FloatType x_type;
  const std::uint32_t* words;  // S: [ceil(inner / 32), stride]
  std::int64_t stride;
  std::int64_t rows, inner, columns;
  const float* scale;  // [columns]; nullptr: 1
  const void* add;     // [rows, columns], of out_type, may be `out` itself; nullptr: 0
  void* out;           // [rows, columns]
  FloatType out_type;
};

// A part of a product: its rows and columns [begin, end). The first column is a multiple of 32, and
// there are at most kSignColumns of them, for a task keeps a row of sums on its stack.
struct SignRange {
  std::int64_t row_begin, row_end, column_begin, column_end;
};

constexpr std::int64_t kSignRows = 8;  // rows that share the work on a word
constexpr std::int64_t kSignColumns = 1024;

struct SignKernels {
  void (*product)(const SignProduct&, const SignRange&);
  // out[i] bit j = in[j] bit i, of 32 words each, for `tiles` tiles: of the words in [32 t + j],
  // out [t * out_stride + i].
  void (*transpose)(const std::uint32_t* in, std::uint32_t* out, std::int64_t tiles,
                    std::int64_t out_stride);
};

}  // namespace fedkernels
