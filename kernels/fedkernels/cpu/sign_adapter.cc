// Sign products in float32: tables of signed sums of 4 inputs, looked up by permutations.
//
// Every instruction set adds the same numbers in the same order, so all give the same bits: a table
// entry is ((+-x0 +-x1) +-x2) +-x3, entries are added in order over 128 inputs, and these sums too.
// A fused multiply-add by +-1 rounds exactly as a sum does.

#include "sign_adapter.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fedkernels {
namespace FK_ISA {
namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16, kTable = 16, kMostSums = 16, kMostVectors = 8;
using Vector = __m512;
using Bits = __m512i;
using Selector = __m512i;

Vector zeros() { return _mm512_setzero_ps(); }
Vector load(const float* p) { return _mm512_loadu_ps(p); }
void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
Bits load_bits(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
Bits next(Bits bits) { return _mm512_srli_epi32(bits, 4); }
Selector selector(Bits bits) { return bits; }  // the permutation reads the low 4 bits of a lane

// Sums are multiply-adds by 1, which the compiler must not see through: on Zen 4 and 5 additions and
// permutations compete for the same two pipes, and multiply-adds have their own (1.8 x faster).
struct Adder {
  Vector one = _mm512_set1_ps(1.0f);
  Adder() { asm("" : "+v"(one)); }
  Vector operator()(Vector sum, const float* table, Selector selector) const {
    return _mm512_fmadd_ps(_mm512_permutexvar_ps(selector, _mm512_load_ps(table)), one, sum);
  }
};

void build_table(const float* x, float* table) {
  const Vector signs0 = _mm512_setr_ps(1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1);
  const Vector signs1 = _mm512_setr_ps(1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1);
  const Vector signs2 = _mm512_setr_ps(1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1);
  const Vector signs3 = _mm512_setr_ps(1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1);
  Vector sums = _mm512_mul_ps(signs0, _mm512_set1_ps(x[0]));
  sums = _mm512_fmadd_ps(signs1, _mm512_set1_ps(x[1]), sums);
  sums = _mm512_fmadd_ps(signs2, _mm512_set1_ps(x[2]), sums);
  _mm512_store_ps(table, _mm512_fmadd_ps(signs3, _mm512_set1_ps(x[3]), sums));
}

#elif defined(__AVX2__)

// 8 lanes hold the sums with +x3; those with -x3 are the opposites of their mirror images. So where
// bit 3 of a group is set, the lower bits are inverted, and the entry is multiplied by -1.
constexpr int kLanes = 8, kTable = 8, kMostSums = 8, kMostVectors = 4;
using Vector = __m256;
using Bits = __m256i;
struct Selector {
  __m256i index;
  __m256 sign;
};

Vector zeros() { return _mm256_setzero_ps(); }
Vector load(const float* p) { return _mm256_loadu_ps(p); }
void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
Bits load_bits(const std::uint32_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i fourth = _mm256_and_si256(_mm256_srli_epi32(bits, 3), _mm256_set1_epi32(0x11111111));
  return _mm256_xor_si256(bits, _mm256_sub_epi32(_mm256_slli_epi32(fourth, 3), fourth));
}
Bits next(Bits bits) { return _mm256_srli_epi32(bits, 4); }
Selector selector(Bits bits) {
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(bits, 28), _mm256_set1_epi32(1 << 31));
  return {bits, _mm256_or_ps(_mm256_castsi256_ps(sign), _mm256_set1_ps(1.0f))};
}

struct Adder {
  Vector operator()(Vector sum, const float* table, const Selector& selector) const {
    return _mm256_fmadd_ps(_mm256_permutevar8x32_ps(_mm256_load_ps(table), selector.index),
                           selector.sign, sum);
  }
};

void build_table(const float* x, float* table) {
  const Vector signs0 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
  const Vector signs1 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
  const Vector signs2 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
  Vector sums = _mm256_mul_ps(signs0, _mm256_set1_ps(x[0]));
  sums = _mm256_fmadd_ps(signs1, _mm256_set1_ps(x[1]), sums);
  sums = _mm256_fmadd_ps(signs2, _mm256_set1_ps(x[2]), sums);
  _mm256_store_ps(table, _mm256_add_ps(sums, _mm256_set1_ps(x[3])));
}

#elif defined(__ARM_NEON)

// The half tables of AVX2, looked up by bytes: 8 floats are two registers.
constexpr int kLanes = 4, kTable = 8, kMostSums = 16, kMostVectors = 8;
using Vector = float32x4_t;
using Bits = uint32x4_t;
struct Selector {
  uint8x16_t index;
  float32x4_t sign;
};

Vector zeros() { return vdupq_n_f32(0.0f); }
Vector load(const float* p) { return vld1q_f32(p); }
void store(float* p, Vector v) { vst1q_f32(p, v); }
Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
Bits load_bits(const std::uint32_t* p) {
  const uint32x4_t bits = vld1q_u32(p);
  const uint32x4_t fourth = vandq_u32(vshrq_n_u32(bits, 3), vdupq_n_u32(0x11111111u));
  return veorq_u32(bits, vsubq_u32(vshlq_n_u32(fourth, 3), fourth));
}
Bits next(Bits bits) { return vshrq_n_u32(bits, 4); }
Selector selector(Bits bits) {
  const uint32x4_t entry = vandq_u32(bits, vdupq_n_u32(7));
  const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100u), entry, vdupq_n_u32(0x04040404u));
  const uint32x4_t sign = vandq_u32(vshlq_n_u32(bits, 28), vdupq_n_u32(0x80000000u));
  return {vreinterpretq_u8_u32(bytes),
          vreinterpretq_f32_u32(vorrq_u32(sign, vreinterpretq_u32_f32(vdupq_n_f32(1.0f))))};
}

struct Adder {
  Vector operator()(Vector sum, const float* table, const Selector& selector) const {
    const uint8x16x2_t bytes = {{vreinterpretq_u8_f32(vld1q_f32(table)),
                                 vreinterpretq_u8_f32(vld1q_f32(table + 4))}};
    const uint8x16_t entries = vqtbl2q_u8(bytes, selector.index);
    return vfmaq_f32(sum, vreinterpretq_f32_u8(entries), selector.sign);
  }
};

void build_table(const float* x, float* table) {
  for (int i = 0; i < kTable; ++i) {
    table[i] = (((i & 1 ? -x[0] : x[0]) + (i & 2 ? -x[1] : x[1])) + (i & 4 ? -x[2] : x[2])) + x[3];
  }
}

#else

constexpr int kLanes = 1, kTable = 16, kMostSums = 8, kMostVectors = 8;
using Vector = float;
using Bits = std::uint32_t;
using Selector = std::uint32_t;

Vector zeros() { return 0.0f; }
Vector load(const float* p) { return *p; }
void store(float* p, Vector v) { *p = v; }
Vector add(Vector a, Vector b) { return a + b; }
Bits load_bits(const std::uint32_t* p) { return *p; }
Bits next(Bits bits) { return bits >> 4; }
Selector selector(Bits bits) { return bits & 15u; }

struct Adder {
  Vector operator()(Vector sum, const float* table, Selector selector) const {
    return sum + table[selector];
  }
};

void build_table(const float* x, float* table) {
  for (int i = 0; i < kTable; ++i) {
    table[i] = (((i & 1 ? -x[0] : x[0]) + (i & 2 ? -x[1] : x[1])) + (i & 4 ? -x[2] : x[2])) +
               (i & 8 ? -x[3] : x[3]);
  }
}

#endif

struct Lookup {
  using Entry = float;
  static constexpr std::int64_t kTile = 128;
  static constexpr int kEntries = 8 * kTable;
  static constexpr int kLanes = FK_ISA::kLanes, kSums = kMostSums, kVectors = kMostVectors;

  // Tables lie by group of 4 inputs, then by row.
  template <int R>
  static float build(const float* x, std::int64_t words, float* tables, int r) {
    for (std::int64_t g = 0; g < 8 * words; ++g) build_table(x + 4 * g, tables + (g * R + r) * kTable);
    return 1.0f;
  }

  template <int R, int S>
  static void accumulate(const float* table, const float*, const std::uint32_t* words,
                         std::int64_t stride, std::int64_t count, float* out) {
    const Adder added;
    Vector sums[R][S];
    for (int r = 0; r < R; ++r) {
      for (int s = 0; s < S; ++s) sums[r][s] = zeros();
    }
    for (std::int64_t w = 0; w < count; ++w, words += stride) {
      Bits bits[S];
      for (int s = 0; s < S; ++s) bits[s] = load_bits(words + s * kLanes);
      for (int group = 0; group < 8; ++group, table += R * kTable) {
        for (int s = 0; s < S; ++s) {
          const Selector selected = selector(bits[s]);
          for (int r = 0; r < R; ++r) sums[r][s] = added(sums[r][s], table + r * kTable, selected);
          bits[s] = next(bits[s]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int s = 0; s < S; ++s) {
        float* place = out + r * kSignColumns + s * kLanes;
        store(place, add(load(place), sums[r][s]));
      }
    }
  }
};

// Swaps off-diagonal blocks of 16, 8, 4, 2, 1 bits.
void transpose_tile(std::uint32_t* words) {
  std::uint32_t mask = 0x0000FFFFu;
  for (int width = 16; width > 0; width /= 2, mask ^= mask << width) {
    for (int start = 0; start < 32; start += 2 * width) {
      for (int i = start; i < start + width; ++i) {
        const std::uint32_t swapped = ((words[i] >> width) ^ words[i + width]) & mask;
        words[i] ^= swapped << width;
        words[i + width] ^= swapped;
      }
    }
  }
}

void transpose(const std::uint32_t* in, std::uint32_t* out, std::int64_t tiles,
               std::int64_t out_stride) {
  for (std::int64_t t = 0; t < tiles; ++t) {
    std::uint32_t words[32];
    for (int i = 0; i < 32; ++i) words[i] = in[32 * t + i];
    transpose_tile(words);
    for (int i = 0; i < 32; ++i) out[t * out_stride + i] = words[i];
  }
}

}  // namespace
}  // namespace FK_ISA
}  // namespace fedkernels

#include "sign_tiles.h"

namespace fedkernels {
namespace FK_ISA {

extern const SignKernels kSignKernels;
const SignKernels kSignKernels = {product, transpose};

}  // namespace FK_ISA
}  // namespace fedkernels
