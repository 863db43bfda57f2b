// The product of a few rows with a quantised matrix, whose codes are read once.
#include "quantized_expand.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

#if defined(__AVX512F__)
using Lanes = __m512;
constexpr int kLanes = 16, kTile = 8, kMostRows = 3;
inline Lanes zero() { return _mm512_setzero_ps(); }
inline Lanes load(const float* from) { return _mm512_loadu_ps(from); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
using Lanes = __m256;
constexpr int kLanes = 8, kTile = 4, kMostRows = 3;
inline Lanes zero() { return _mm256_setzero_ps(); }
inline Lanes load(const float* from) { return _mm256_loadu_ps(from); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__ARM_NEON)
using Lanes = float32x4_t;
constexpr int kLanes = 4, kTile = 4, kMostRows = 3;
inline Lanes zero() { return vdupq_n_f32(0.0f); }
inline Lanes load(const float* from) { return vld1q_f32(from); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return vfmaq_f32(c, a, b); }
#elif defined(__GNUC__)
typedef float Lanes __attribute__((vector_size(16)));
constexpr int kLanes = 4, kTile = 4, kMostRows = 2;
inline Lanes zero() { return Lanes{}; }
inline Lanes load(const float* from) {
  Lanes lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
#else
using Lanes = float;
constexpr int kLanes = 1, kTile = 4, kMostRows = 2;
inline Lanes zero() { return 0.0f; }
inline Lanes load(const float* from) { return *from; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
#endif

// Of each row of x and each feature, lane by lane: summed over the lanes only at the end.
constexpr int kFeatures = 8;
using Sums = Lanes[kFewRows][kFeatures];

inline float sum_of(Lanes lanes) {
  float values[kLanes];
  memcpy(values, &lanes, sizeof values);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  }
  return values[0];
}

// ---- any format: weights to float32 in the first-level cache, then multiplied

constexpr i64 kColumns = 512;  // at once

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
    const float* x = input.x + column;
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

// ---- 4 bits, whole blocks in every row: weights go from the codes to the product in registers

#if defined(__AVX512F__)

constexpr i64 kStretch = 1024;  // columns at once: eight rows of x in the first-level cache
constexpr i64 kMostBlocks = kStretch / kGroup;

bool splits(const QuantizedMatrix& matrix) {
  return matrix.table && matrix.block % kGroup == 0 && matrix.columns % matrix.block == 0;
}

// A tile of kRows rows of x and kWide features, over blocks first .. past of each feature's row.
template <int kRows, int kWide, bool kMinimums>
void decode_and_multiply(const QuantizedMatrix& matrix, const float* x, i64 stride, i64 feature,
                         i64 features, i64 first, i64 past, Lanes (*sums)[kFeatures]) {
  const Table table(matrix.table);
  const i64 blocks = matrix.columns / matrix.block, row_bytes = matrix.columns / 2;
  const std::uint8_t* codes[kWide];
  float scale[kWide][kMostBlocks], minimum[kWide][kMostBlocks];
  for (int j = 0; j < kWide; ++j) {
    // A tile beyond the last feature repeats that one, and nobody looks at the result.
    const i64 row = feature + (j < features ? j : features - 1);
    codes[j] = matrix.codes + row * row_bytes + first * matrix.block / 2;
    Scales scales(matrix, row * blocks + first);
    for (i64 b = first; b < past; ++b) scales.next(&scale[j][b - first], &minimum[j][b - first]);
  }
  Lanes tile[kRows][kWide];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kWide; ++j) tile[i][j] = sums[i][j];
  }
  x += first * matrix.block;
  for (i64 b = 0; b < past - first; ++b) {
    // The next tile's codes: streams this short are over before the processor foresees them.
    for (int j = 0; j < kWide; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(codes[j] + kWide * row_bytes), _MM_HINT_T0);
    }
    for (i64 column = 0; column < matrix.block; column += kGroup, x += kGroup) {
      Lanes even[kWide], odd[kWide];
      for (int j = 0; j < kWide; ++j) {
        look_up_pairs(table, codes[j], &even[j], &odd[j]);
        codes[j] += kGroup / 2;
        const Lanes scales = _mm512_set1_ps(scale[j][b]);
        even[j] = _mm512_mul_ps(even[j], scales);
        odd[j] = _mm512_mul_ps(odd[j], scales);
        if (kMinimums) {
          even[j] = _mm512_add_ps(even[j], _mm512_set1_ps(minimum[j][b]));
          odd[j] = _mm512_add_ps(odd[j], _mm512_set1_ps(minimum[j][b]));
        }
      }
      for (int i = 0; i < kRows; ++i) {
        const Lanes even_input = load(x + i * stride);
        const Lanes odd_input = load(x + i * stride + kGroup / 2);
        for (int j = 0; j < kWide; ++j) {
          tile[i][j] = multiply_add(even_input, even[j], tile[i][j]);
          tile[i][j] = multiply_add(odd_input, odd[j], tile[i][j]);
        }
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kWide; ++j) sums[i][j] = tile[i][j];
  }
}

template <int kRows, int kWide>
inline void decode_stretch(const QuantizedMatrix& matrix, const FewRows& input, i64 row, i64 feature,
                           i64 features, i64 first, i64 past, Lanes (*sums)[kFeatures]) {
  const float* x = input.x + row * input.stride;
  for (i64 j = 0; j < features; j += kWide) {
    const i64 left = features - j < kWide ? features - j : kWide;
    Lanes(*tile)[kFeatures] = reinterpret_cast<Lanes(*)[kFeatures]>(&sums[row][j]);
    const auto function = matrix.minimums ? decode_and_multiply<kRows, kWide, true>
                                          : decode_and_multiply<kRows, kWide, false>;
    function(matrix, x, input.stride, feature + j, left, first, past, tile);
  }
}

inline void decode_and_multiply_all(const QuantizedMatrix& matrix, const FewRows& input, i64 feature,
                                    i64 features, Lanes (*sums)[kFeatures]) {
  const i64 blocks = matrix.columns / matrix.block;
  const i64 at_once = matrix.block < kStretch ? kStretch / matrix.block : 1;
  for (i64 first = 0; first < blocks; first += at_once) {
    const i64 past = first + at_once < blocks ? first + at_once : blocks;
    for (i64 row = 0; row < input.rows; row += 8) {
      switch (input.rows - row) {
#define FK_ROWS(rows, wide)                                                                  \
  case rows:                                                                                 \
    decode_stretch<rows, wide>(matrix, input, row, feature, features, first, past, sums);    \
    break;
        FK_ROWS(1, 4)
        FK_ROWS(2, 4)
        FK_ROWS(3, 4)
        FK_ROWS(4, 4)
        FK_ROWS(5, 2)
        FK_ROWS(6, 2)
        FK_ROWS(7, 2)
#undef FK_ROWS
        default:
          decode_stretch<8, 2>(matrix, input, row, feature, features, first, past, sums);
      }
    }
  }
}

#else

bool splits(const QuantizedMatrix&) { return false; }

inline void decode_and_multiply_all(const QuantizedMatrix&, const FewRows&, i64, i64,
                                    Lanes (*)[kFeatures]) {}

#endif

void arrange(const void* x, bool bfloat16, i64 rows, i64 columns, i64 stride, bool split,
             float* out) {
  for (i64 i = 0; i < rows; ++i, out += stride) {
    for (i64 k = columns; k < stride; ++k) out[k] = 0.0f;
    for (i64 k = 0; k < columns; ++k) {
      const i64 at = split ? k / 32 * 32 + k % 2 * 16 + k % 32 / 2 : k;
      if (bfloat16) {
        const std::uint32_t half = static_cast<const std::uint16_t*>(x)[i * columns + k];
        const std::uint32_t bits = half << 16;
        memcpy(out + at, &bits, sizeof bits);
      } else {
        out[at] = static_cast<const float*>(x)[i * columns + k];
      }
    }
  }
}

void multiply(const QuantizedMatrix& matrix, const FewRows& input, i64 first_feature,
              i64 past_feature) {
  alignas(64) Sums sums;
  const i64 at_once = input.split ? kFeatures : kTile;
  for (i64 feature = first_feature; feature < past_feature; feature += at_once) {
    const i64 left = past_feature - feature;
    const i64 features = left < at_once ? left : at_once;
    for (i64 i = 0; i < input.rows; ++i) {
      for (int j = 0; j < kFeatures; ++j) sums[i][j] = zero();
    }
    if (input.split) {
      decode_and_multiply_all(matrix, input, feature, features, sums);
    } else {
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
const QuantizedRowKernels kQuantizedRowKernels = {splits, arrange, multiply};

}  // namespace FK_ISA
}  // namespace fedkernels
