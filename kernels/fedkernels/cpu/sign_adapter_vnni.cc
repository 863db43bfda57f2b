// Sign products in 16-bit fixed point, for bfloat16 numbers on processors with AVX-512 VNNI.
//
// A row's 256 inputs are rounded to multiples of unit = largest / 8191: 14 bits, six more than
// bfloat16 has beside its exponent. A register then holds two tables of 16 signed sums of 4 inputs,
// the even lanes of an index look into the first and the odd ones into the second, and one
// instruction adds both to 32-bit sums, which are exact: 8 inputs where float32 has 4. The error is at
// most unit / 2 an input, or 6e-4 of the norm of the 256 (sqrt(256 / 12) / 8191), whatever they are.

#include <immintrin.h>

#include "sign_adapter.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

constexpr float kLargest = 8191.0f;  // four of them fit 16 bits
constexpr int kSteps = 4;            // of 8 inputs: a group of the word's lower half, one of its upper

struct Lookup {
  using Entry = std::int16_t;
  static constexpr std::int64_t kTile = 256;
  static constexpr int kEntries = kSteps * 32;
  static constexpr int kLanes = 16, kSums = 16, kVectors = 8;

  // The largest magnitude as bits, for these order as the numbers do, with NaN above infinity.
  static std::uint32_t largest_bits(const float* x, std::int64_t words) {
    __m512i largest = _mm512_setzero_si512();
    for (std::int64_t i = 0; i < 32 * words; i += 16) {
      const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(x + i));
      largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF)));
    }
    return _mm512_reduce_max_epu32(largest);
  }

  // Returns the unit. Where an input is not finite it is NaN, and so are the sums.
  template <int R>
  static float build(const float* x, std::int64_t words, Entry* tables, int r) {
    const __m512i bits = _mm512_set1_epi32(static_cast<int>(largest_bits(x, words)));
    const float largest = _mm512_cvtss_f32(_mm512_castsi512_ps(bits));
    const bool finite = largest < __builtin_inff();
    // The inverse of a tiny number is infinite.
    const float lift = largest < 1e-30f ? 0x1p64f : 1.0f;
    const float inverse = finite && largest > 0.0f ? kLargest / (largest * lift) : 0.0f;
    const __m512 factor = _mm512_set1_ps(inverse), lifted = _mm512_set1_ps(lift);
    for (std::int64_t w = 0; w < words; ++w, x += 32) {
      const __m512 low = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x), lifted), factor);
      const __m512 high = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + 16), lifted), factor);
      const __m256i low_half = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(low));
      const __m256i high_half = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(high));
      build_word(_mm512_inserti64x4(_mm512_castsi256_si512(low_half), high_half, 1),
                 tables + (w * kSteps * R + r) * 32, R * 32);
    }
    return finite ? largest * lift / kLargest / lift : __builtin_nanf("");
  }

  // From pairs (a, b): their sums in even lanes and b - a in odd ones. With i the number of an entry,
  // bit 0 (or 2) set for -a and bit 1 (or 3) for -b, the entry has the sum where both bits are
  // equal, else the difference, and the opposite where the second bit is set.
  static void build_word(__m512i x, Entry* tables, int gap) {
    const __m512i turned = _mm512_rol_epi32(x, 16);
    const __m512i pairs = _mm512_mask_sub_epi16(_mm512_add_epi16(x, turned), 0xAAAAAAAAu, x, turned);
    const __m512i first = _mm512_setr_epi32(
        0x00010000, 0x00000001, 0x00010000, 0x00000001, 0x00010000, 0x00000001, 0x00010000,
        0x00000001, 0x00110010, 0x00100011, 0x00110010, 0x00100011, 0x00110010, 0x00100011,
        0x00110010, 0x00100011);
    const __m512i second = _mm512_setr_epi32(
        0x00020002, 0x00020002, 0x00030003, 0x00030003, 0x00030003, 0x00030003, 0x00020002,
        0x00020002, 0x00120012, 0x00120012, 0x00130013, 0x00130013, 0x00130013, 0x00130013,
        0x00120012, 0x00120012);
    const __m512i zero = _mm512_setzero_si512();
    for (int step = 0; step < kSteps; ++step, tables += gap) {
      const __m512i offset = _mm512_set1_epi16(static_cast<short>(4 * step));
      __m512i a = _mm512_permutexvar_epi16(_mm512_add_epi16(first, offset), pairs);
      __m512i b = _mm512_permutexvar_epi16(_mm512_add_epi16(second, offset), pairs);
      a = _mm512_mask_sub_epi16(a, 0xCCCCCCCCu, zero, a);
      b = _mm512_mask_sub_epi16(b, 0xFF00FF00u, zero, b);
      _mm512_store_si512(tables, _mm512_add_epi16(a, b));
    }
  }

  template <int R, int S>
  static void accumulate(const Entry* table, const float* units, const std::uint32_t* words,
                         std::int64_t stride, std::int64_t count, float* out) {
    const __m512i ones = _mm512_set1_epi16(1);
    const __m512i nibbles = _mm512_set1_epi32(0x000F000F), odd = _mm512_set1_epi32(0x00100000);
    __m512i sums[R][S];
    for (int r = 0; r < R; ++r) {
      for (int s = 0; s < S; ++s) sums[r][s] = _mm512_setzero_si512();
    }
    for (std::int64_t w = 0; w < count; ++w, words += stride) {
      __m512i bits[S];
      for (int s = 0; s < S; ++s) bits[s] = _mm512_loadu_si512(words + s * kLanes);
      for (int step = 0; step < kSteps; ++step, table += R * 32) {
        for (int s = 0; s < S; ++s) {
          // (bits and nibbles) or odd
          const __m512i index = _mm512_ternarylogic_epi32(bits[s], nibbles, odd, 0xEA);
          for (int r = 0; r < R; ++r) {
            const __m512i entries = _mm512_load_si512(table + r * 32);
            sums[r][s] = _mm512_dpwssd_epi32(sums[r][s], _mm512_permutexvar_epi16(index, entries),
                                             ones);
          }
          bits[s] = _mm512_srli_epi32(bits[s], 4);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      const __m512 unit = _mm512_set1_ps(units[r]);
      for (int s = 0; s < S; ++s) {
        float* place = out + r * kSignColumns + s * kLanes;
        const __m512 sum = _mm512_cvtepi32_ps(sums[r][s]);
        _mm512_storeu_ps(place, _mm512_fmadd_ps(sum, unit, _mm512_loadu_ps(place)));
      }
    }
  }
};

}  // namespace
}  // namespace FK_ISA
}  // namespace fedkernels

#include "sign_tiles.h"

namespace fedkernels {
namespace FK_ISA {

extern void (*const kSignProduct)(const SignProduct&, const SignRange&);
void (*const kSignProduct)(const SignProduct&, const SignRange&) = product;

}  // namespace FK_ISA
}  // namespace fedkernels
