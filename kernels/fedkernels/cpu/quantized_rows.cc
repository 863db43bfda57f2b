// The product of a few rows with a quantised matrix, whose codes are read once.
#include "quantized_decode.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

// Any format: weights are expanded into the first-level cache, so many columns at once, and multiplied.
constexpr i64 kColumns = 512;

template <int kRows>
inline void multiply_tile(const float* x, i64 stride, const float* weights, i64 columns,
                          Lanes (*sums)[kFeatures]) {
  Lanes tile[kRows][kTile];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kTile; ++j) tile[i][j] = sums[i][j];
  }
  for (i64 k = 0; k < columns; k += kLanes) {
    Lanes input[kRows];
    for (int i = 0; i < kRows; ++i) input[i] = load(x + i * stride + k);
    for (int j = 0; j < kTile; ++j) {
      const Lanes weight = load(weights + j * kColumns + k);
      for (int i = 0; i < kRows; ++i) tile[i][j] = multiply_add(input[i], weight, tile[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kTile; ++j) sums[i][j] = tile[i][j];
  }
}

inline void expand_and_multiply(const QuantizedMatrix& matrix, const FewRows& input, i64 feature,
                                i64 features, Lanes (*sums)[kFeatures]) {
  alignas(64) float weights[kTile * kColumns];
  for (i64 column = 0; column < matrix.columns; column += kColumns) {
    const i64 rest = matrix.columns - column;
    const i64 columns = rest < kColumns ? rest : kColumns;
    const i64 padded = (columns + 15) / 16 * 16;
    for (i64 j = 0; j < kTile; ++j) {
      float* row = weights + j * kColumns;
      const i64 start = (feature + j) * matrix.columns + column;
      const i64 known = j < features ? columns : 0;
      if (known > 0) expand(matrix, start, start + known, row);
      for (i64 k = known; k < padded; ++k) row[k] = 0.0f;
    }
    const float* x = static_cast<const float*>(input.x) + column;
    i64 i = 0;
    for (; i + kMostRows <= input.rows; i += kMostRows) {
      multiply_tile<kMostRows>(x + i * input.stride, input.stride, weights, padded, sums + i);
    }
    if (kMostRows > 2 && i + 2 <= input.rows) {
      multiply_tile<2>(x + i * input.stride, input.stride, weights, padded, sums + i);
      i += 2;
    }
    if (i < input.rows) {
      multiply_tile<1>(x + i * input.stride, input.stride, weights, padded, sums + i);
    }
  }
}

void arrange(const void* x, bool bfloat16, i64 rows, i64 columns, i64 stride, InputLayout layout,
             void* out) {
  for (i64 i = 0; i < rows; ++i) {
    for (i64 k = 0; k < stride; ++k) {
      const bool split = layout != InputLayout::float32;
      const i64 to = i * stride + (split ? k / 32 * 32 + k % 2 * 16 + k % 32 / 2 : k);
      const i64 from = i * columns + k;
      const bool padding = k >= columns;
      if (layout == InputLayout::split_bfloat16) {
        const auto* halves = static_cast<const std::uint16_t*>(x);
        static_cast<std::uint16_t*>(out)[to] = padding ? std::uint16_t{0} : halves[from];
      } else if (bfloat16) {
        const std::uint32_t bits =
            padding ? 0u : std::uint32_t{static_cast<const std::uint16_t*>(x)[from]} << 16;
        memcpy(static_cast<float*>(out) + to, &bits, sizeof bits);
      } else {
        static_cast<float*>(out)[to] = padding ? 0.0f : static_cast<const float*>(x)[from];
      }
    }
  }
}

void multiply(const QuantizedMatrix& matrix, const FewRows& input, i64 first_feature,
              i64 past_feature) {
  alignas(64) Sums sums;
  const i64 at_once = input.layout == InputLayout::float32 ? kTile : kFeatures;
  for (i64 feature = first_feature; feature < past_feature; feature += at_once) {
    const i64 left = past_feature - feature;
    const i64 features = left < at_once ? left : at_once;
    for (i64 i = 0; i < input.rows; ++i) {
      for (int j = 0; j < kFeatures; ++j) sums[i][j] = zero();
    }
    switch (input.layout) {
#if defined(__AVX512BF16__)
      case InputLayout::split_bfloat16:
        decode_and_multiply_all<Bfloat16Group>(matrix, input, feature, features, sums);
        break;
#endif
#if defined(__AVX512F__)
      case InputLayout::split_float32:
        decode_and_multiply_all<Float32Group>(matrix, input, feature, features, sums);
        break;
#endif
      default:
        expand_and_multiply(matrix, input, feature, features, sums);
    }
    for (i64 i = 0; i < input.rows; ++i) {
      for (i64 j = 0; j < features; ++j) {
        const float value = sum_of(sums[i][j]) + (input.bias ? input.bias[feature + j] : 0.0f);
        const i64 at = i * matrix.rows + feature + j;
        if (input.bfloat16) {
          // A NaN of the input must not round to infinity.
          const std::uint16_t half = value == value ? bfloat16_of(value) : 0x7FC0u;
          static_cast<std::uint16_t*>(input.y)[at] = half;
        } else {
          static_cast<float*>(input.y)[at] = value;
        }
      }
    }
  }
}

}  // namespace

extern const QuantizedRowKernels kQuantizedRowKernels;
const QuantizedRowKernels kQuantizedRowKernels = {layout, arrange, multiply};

}  // namespace FK_ISA
}  // namespace fedkernels
