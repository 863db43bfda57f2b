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

// ---- 4 bits, whole blocks in every row: weights go from the codes to the product in registers

#if defined(__AVX512F__)

constexpr i64 kStretch = 1024;  // columns at once: eight rows of x in the first-level cache
constexpr i64 kMostBlocks = kStretch / kGroup;

InputLayout layout(const QuantizedMatrix& matrix, bool bfloat16) {
  const bool whole = matrix.block % kGroup == 0 && matrix.columns % matrix.block == 0;
  if (!matrix.table || !whole) return InputLayout::float32;
#if defined(__AVX512BF16__)
  if (bfloat16) return InputLayout::split_bfloat16;
#endif
  (void)bfloat16;
  return InputLayout::split_float32;
}

// One group of 32 columns: the weights of a feature, and their product with a row of x.
struct Float32Group {
  using Input = float;
  Lanes even, odd;
  void set(Lanes even_weights, Lanes odd_weights) {
    even = even_weights;
    odd = odd_weights;
  }
  Lanes add_product(const float* x, Lanes sum) const {
    return multiply_add(load(x + kGroup / 2), odd, multiply_add(load(x), even, sum));
  }
};

#if defined(__AVX512BF16__)
struct Bfloat16Group {
  using Input = std::uint16_t;
  __m512bh weights;
  void set(Lanes even_weights, Lanes odd_weights) {
    weights = _mm512_cvtne2ps_pbh(odd_weights, even_weights);
  }
  Lanes add_product(const std::uint16_t* x, Lanes sum) const {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(x), weights);
  }
};
#endif

// Scales and minimums of blocks first .. past, sixteen at a time; room for 15 more is needed.
void decode_scales(const QuantizedMatrix& matrix, i64 first, i64 past, float* scale, float* minimum) {
  const auto* halves = static_cast<const std::uint16_t*>(matrix.scales);
  const auto* bytes = static_cast<const std::uint8_t*>(matrix.scales);
  for (i64 b = first; b < past;) {
    i64 count = past - b < 16 ? past - b : 16;
    const auto present = static_cast<__mmask16>((1u << count) - 1);
    if (matrix.scale_type == ScaleType::nested) {
      const i64 nested = b / matrix.nested_block;
      const i64 left = (nested + 1) * matrix.nested_block - b;
      count = count < left ? count : left;
      const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(present, bytes + b));
      const Lanes values = _mm512_i32gather_ps(codes, matrix.nested_code, sizeof(float));
      const Lanes products = _mm512_mul_ps(values, _mm512_set1_ps(matrix.nested_scales[nested]));
      const Lanes sums = _mm512_add_ps(products, _mm512_set1_ps(*matrix.nested_offset));
      _mm512_storeu_ps(scale + (b - first), sums);
    } else if (matrix.scale_type == ScaleType::float16) {
      const __m256i some = _mm256_maskz_loadu_epi16(present, halves + b);
      _mm512_storeu_ps(scale + (b - first), _mm512_cvtph_ps(some));
    } else {
      const auto* floats = static_cast<const float*>(matrix.scales);
      _mm512_storeu_ps(scale + (b - first), _mm512_maskz_loadu_ps(present, floats + b));
    }
    if (matrix.minimums) {
      const __m256i some = _mm256_maskz_loadu_epi16(present, matrix.minimums + b);
      _mm512_storeu_ps(minimum + (b - first), _mm512_cvtph_ps(some));
    }
    b += count;
  }
}

// A tile of kRows rows of x and kWide features, over blocks first .. past of each feature's row.
template <typename Group, int kRows, int kWide, bool kMinimums>
void decode_and_multiply(const QuantizedMatrix& matrix, const typename Group::Input* x, i64 stride,
                         i64 feature, i64 features, i64 first, i64 past, Lanes (*sums)[kFeatures]) {
  const Table table(matrix.table);
  const i64 blocks = matrix.columns / matrix.block, row_bytes = matrix.columns / 2;
  const std::uint8_t* codes[kWide];
  float scale[kWide][kMostBlocks + 16], minimum[kWide][kMostBlocks + 16];
  for (int j = 0; j < kWide; ++j) {
    // A tile beyond the last feature repeats that one, and nobody looks at the result.
    const i64 row = feature + (j < features ? j : features - 1);
    codes[j] = matrix.codes + row * row_bytes + first * matrix.block / 2;
    decode_scales(matrix, row * blocks + first, row * blocks + past, scale[j], minimum[j]);
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
      Group groups[kWide];
      for (int j = 0; j < kWide; ++j) {
        Lanes even, odd;
        look_up_pairs(table, codes[j], &even, &odd);
        codes[j] += kGroup / 2;
        const Lanes scales = _mm512_set1_ps(scale[j][b]);
        even = _mm512_mul_ps(even, scales);
        odd = _mm512_mul_ps(odd, scales);
        if (kMinimums) {
          even = _mm512_add_ps(even, _mm512_set1_ps(minimum[j][b]));
          odd = _mm512_add_ps(odd, _mm512_set1_ps(minimum[j][b]));
        }
        groups[j].set(even, odd);
      }
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kWide; ++j) tile[i][j] = groups[j].add_product(x + i * stride, tile[i][j]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kWide; ++j) sums[i][j] = tile[i][j];
  }
}

template <typename Group, int kRows, int kWide>
inline void decode_stretch(const QuantizedMatrix& matrix, const FewRows& input, i64 row, i64 feature,
                           i64 features, i64 first, i64 past, Lanes (*sums)[kFeatures]) {
  const auto* x = static_cast<const typename Group::Input*>(input.x) + row * input.stride;
  for (i64 j = 0; j < features; j += kWide) {
    const i64 left = features - j < kWide ? features - j : kWide;
    Lanes(*tile)[kFeatures] = reinterpret_cast<Lanes(*)[kFeatures]>(&sums[row][j]);
    const auto function = matrix.minimums ? decode_and_multiply<Group, kRows, kWide, true>
                                          : decode_and_multiply<Group, kRows, kWide, false>;
    function(matrix, x, input.stride, feature + j, left, first, past, tile);
  }
}

template <typename Group>
void decode_and_multiply_all(const QuantizedMatrix& matrix, const FewRows& input, i64 feature,
                             i64 features, Lanes (*sums)[kFeatures]) {
  const i64 blocks = matrix.columns / matrix.block;
  const i64 at_once = matrix.block < kStretch ? kStretch / matrix.block : 1;
  for (i64 first = 0; first < blocks; first += at_once) {
    const i64 past = first + at_once < blocks ? first + at_once : blocks;
    for (i64 row = 0; row < input.rows; row += 8) {
      switch (input.rows - row) {
#define FK_ROWS(label, rows, wide)                                                            \
  label:                                                                                      \
  decode_stretch<Group, rows, wide>(matrix, input, row, feature, features, first, past, sums); \
  break;
        FK_ROWS(case 1, 1, 4)
        FK_ROWS(case 2, 2, 4)
        FK_ROWS(case 3, 3, 4)
        FK_ROWS(case 4, 4, 4)
        FK_ROWS(case 5, 5, 2)
        FK_ROWS(case 6, 6, 2)
        FK_ROWS(case 7, 7, 2)
        FK_ROWS(default, 8, 2)
#undef FK_ROWS
      }
    }
  }
}

#else

InputLayout layout(const QuantizedMatrix&, bool) { return InputLayout::float32; }

#endif

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
