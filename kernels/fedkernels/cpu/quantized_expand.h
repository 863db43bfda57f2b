// Codes to weights, for the families that need them: compiled anew in each (see isa.h).
#pragma once

#include "quantized.h"

#include <string.h>

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own headers of AVX-512 start from undefined registers and warn of it (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fedkernels {
namespace FK_ISA {
namespace {

using i64 = std::int64_t;

inline float float_of_half(std::uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t rest = half & 0x7FFFu;
  if (rest < 0x400u) {  // zero or subnormal: a multiple of 2**-24
    const float value = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -value : value;
  }
  const std::uint32_t bits = sign | (rest < 0x7C00u ? (rest << 13) + 0x38000000u
                                                    : (rest << 13) | 0x7F800000u);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Walks over the blocks; a division for each would cost as much as the weights of the block.
class Scales {
 public:
  Scales(const QuantizedMatrix& matrix, i64 block)
      : matrix_(matrix), block_(block), nested_(0), left_(0) {
    if (matrix.scale_type == ScaleType::nested) {
      nested_ = block / matrix.nested_block;
      left_ = matrix.nested_block - block % matrix.nested_block;
    }
  }

  void next(float* scale, float* minimum) {
    if (matrix_.scale_type == ScaleType::nested) {
      if (left_ == 0) {
        ++nested_;
        left_ = matrix_.nested_block;
      }
      --left_;
      const std::uint8_t code = static_cast<const std::uint8_t*>(matrix_.scales)[block_];
      const float product = matrix_.nested_code[code] * matrix_.nested_scales[nested_];
      *scale = product + *matrix_.nested_offset;
    } else if (matrix_.scale_type == ScaleType::float16) {
      *scale = float_of_half(static_cast<const std::uint16_t*>(matrix_.scales)[block_]);
    } else {
      *scale = static_cast<const float*>(matrix_.scales)[block_];
    }
    // Adding -0 changes no value, not even the sign of a zero.
    *minimum = matrix_.minimums ? float_of_half(matrix_.minimums[block_]) : -0.0f;
    ++block_;
  }

 private:
  const QuantizedMatrix& matrix_;
  i64 block_, nested_, left_;
};

// To the nearest bfloat16, ties to even; not for NaN.
inline std::uint16_t bfloat16_of(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline void store(float value, float* out) { *out = value; }
inline void store(float value, std::uint16_t* out) { *out = bfloat16_of(value); }

constexpr i64 kGroup = 32;  // weights that are expanded at once, from 16 bytes

#if defined(__AVX512F__)

struct Table {
  __m512 values;
  explicit Table(const float* table) : values(_mm512_loadu_ps(table)) {}
};

inline __m512 affine(__m512 value, __m512 scale, __m512 minimum) {
  return _mm512_add_ps(_mm512_mul_ps(value, scale), minimum);
}

// Weights 2i and 2i + 1 of the group, in lane i; a lookup sees only the low four bits of a lane.
inline void look_up_pairs(const Table& table, const std::uint8_t* bytes, __m512* even, __m512* odd) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m512i codes = _mm512_cvtepu8_epi32(packed);
  *even = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table.values);
  *odd = _mm512_permutexvar_ps(codes, table.values);
}

inline void expand_pairs(const Table& table, const std::uint8_t* bytes, __m512 scale, __m512 minimum,
                         __m512* even, __m512* odd) {
  look_up_pairs(table, bytes, even, odd);
  *even = affine(*even, scale, minimum);
  *odd = affine(*odd, scale, minimum);
}

inline void expand_group(const Table& table, const std::uint8_t* bytes, float scale, float minimum,
                         float* out) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  __m512 even, odd;
  expand_pairs(table, bytes, _mm512_set1_ps(scale), _mm512_set1_ps(minimum), &even, &odd);
  _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, first, odd));
  _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, second, odd));
}

inline __m512i rounded(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), last);
}

// A lane of 32 bits holds two neighbours in bfloat16, so they need no shuffle.
inline void expand_group(const Table& table, const std::uint8_t* bytes, float scale, float minimum,
                         std::uint16_t* out) {
  __m512 even, odd;
  expand_pairs(table, bytes, _mm512_set1_ps(scale), _mm512_set1_ps(minimum), &even, &odd);
  const __m512i low = _mm512_srli_epi32(rounded(even), 16);
  const __m512i high = _mm512_and_si512(rounded(odd), _mm512_set1_epi32(~0xFFFF));
  _mm512_storeu_si512(out, _mm512_or_si512(low, high));
}

#elif defined(__AVX2__)

struct Table {
  __m256 low, high;
  explicit Table(const float* table)
      : low(_mm256_loadu_ps(table)), high(_mm256_loadu_ps(table + 8)) {}
};

// A lookup sees three bits of a lane; the fourth, moved to the sign, chooses the half of the table.
inline __m256 look_up(const Table& table, __m256i codes) {
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, codes),
                          _mm256_permutevar8x32_ps(table.high, codes), upper);
}

inline void expand_group(const Table& table, const std::uint8_t* bytes, float scale, float minimum,
                         float* out) {
  const __m256 scales = _mm256_set1_ps(scale), minimums = _mm256_set1_ps(minimum);
  for (int i = 0; i < 2; ++i) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * i));
    const __m256i codes = _mm256_cvtepu8_epi32(packed);
    __m256 even = look_up(table, _mm256_srli_epi32(codes, 4));
    __m256 odd = look_up(table, codes);
    even = _mm256_add_ps(_mm256_mul_ps(even, scales), minimums);
    odd = _mm256_add_ps(_mm256_mul_ps(odd, scales), minimums);
    const __m256 left = _mm256_unpacklo_ps(even, odd), right = _mm256_unpackhi_ps(even, odd);
    _mm256_storeu_ps(out + 16 * i, _mm256_permute2f128_ps(left, right, 0x20));
    _mm256_storeu_ps(out + 16 * i + 8, _mm256_permute2f128_ps(left, right, 0x31));
  }
}

#else

struct Table {
  const float* values;
  explicit Table(const float* table) : values(table) {}
};

inline void expand_group(const Table& table, const std::uint8_t* bytes, float scale, float minimum,
                         float* out) {
  for (int i = 0; i < kGroup / 2; ++i) {
    out[2 * i] = table.values[bytes[i] >> 4] * scale + minimum;
    out[2 * i + 1] = table.values[bytes[i] & 15] * scale + minimum;
  }
}

#endif

#if !defined(__AVX512F__)
inline void expand_group(const Table& table, const std::uint8_t* bytes, float scale, float minimum,
                         std::uint16_t* out) {
  float values[kGroup];
  expand_group(table, bytes, scale, minimum, values);
  for (int i = 0; i < kGroup; ++i) out[i] = bfloat16_of(values[i]);
}
#endif

// `count` weights from weight `first` of the matrix on, all of one block.
template <typename Out>
inline void expand4(const float* values, const Table& table, const std::uint8_t* codes, i64 first,
                    i64 count, float scale, float minimum, Out* out) {
  if (count > 0 && first % 2) {
    store(values[codes[first / 2] & 15] * scale + minimum, out);
    ++first, ++out, --count;
  }
  const std::uint8_t* bytes = codes + first / 2;
  for (; count >= kGroup; count -= kGroup, bytes += kGroup / 2, out += kGroup) {
    expand_group(table, bytes, scale, minimum, out);
  }
  for (i64 i = 0; i < count; ++i) {
    const int code = i % 2 ? bytes[i / 2] & 15 : bytes[i / 2] >> 4;
    store(values[code] * scale + minimum, out + i);
  }
}

template <typename Out>
inline void expand8(const std::int8_t* codes, i64 count, float scale, float minimum, Out* out) {
  for (i64 i = 0; i < count; ++i) {
    store(static_cast<float>(codes[i]) * scale + minimum, out + i);
  }
}

template <typename Out>
void expand(const QuantizedMatrix& matrix, i64 first, i64 past, Out* out) {
  const float none[16] = {};
  const float* values = matrix.table ? matrix.table : none;
  const Table table(values);
  i64 block = first / matrix.block;
  Scales scales(matrix, block);
  while (first < past) {
    float scale, minimum;
    scales.next(&scale, &minimum);
    const i64 end = ++block * matrix.block;
    const i64 count = (end < past ? end : past) - first;
    if (matrix.table) {
      expand4(values, table, matrix.codes, first, count, scale, minimum, out);
    } else {
      const std::int8_t* codes = reinterpret_cast<const std::int8_t*>(matrix.codes) + first;
      expand8(codes, count, scale, minimum, out);
    }
    first += count;
    out += count;
  }
}

}  // namespace
}  // namespace FK_ISA
}  // namespace fedkernels
