// Sums of signed coefficients, for probes of bits: sums[i] += sum_k (bit i of seed k ? -c_k : c_k).
//
// The bits of kGroup seeds at one element are an index into a table of all signed sums of their
// coefficients: one lookup and one addition serve kGroup seeds. The words of the seeds are mixed such
// that the index stands in the lowest four bits of a lane, where the permutation reads it, after a
// shift. Sums of neighbouring lanes then belong to elements 32 apart; `natural_order` undoes that once
// a tile. Included by files that are compiled once for each instruction set.
#pragma once

#include "probe_tiles.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kGroup = 4;    // seeds of one table
constexpr int kLanes = 16;   // words handled at once
#elif defined(__AVX2__)
constexpr int kGroup = 3;    // a permutation of 8 lanes reads 3 bits
constexpr int kLanes = 8;
#else
constexpr int kGroup = 4;
constexpr int kLanes = 1;
#endif
constexpr int kGroupsAtOnce = 4;
constexpr int kSeedsAtOnce = kGroup * kGroupsAtOnce;

// Words of a tile and sums of a tile, in whole vectors.
constexpr std::int64_t kSumRoom = kTile;

inline void signed_table(const std::int32_t* coefficients, std::int32_t* table) {
  for (int n = 0; n < (1 << kGroup); ++n) {
    std::int32_t sum = 0;
    for (int b = 0; b < kGroup; ++b) sum += n >> b & 1 ? -coefficients[b] : coefficients[b];
    table[n] = sum;
  }
}

// sums: kTile, in the order of `natural_order`; words [seeds][kWordRoom]; coefficients [seeds], seeds a
// multiple of kGroup and at most kSeedsAtOnce; count: words of the tile.
inline void add_signed_sums(std::int32_t* sums, const std::uint32_t (*words)[kWordRoom],
                            const std::int32_t* coefficients, int seeds, std::int64_t count) {
  alignas(64) std::int32_t tables[kGroupsAtOnce][16];
  const int groups = seeds / kGroup;
  for (int g = 0; g < groups; ++g) signed_table(coefficients + kGroup * g, tables[g]);
#if defined(__AVX512F__)
  const __m512i even = _mm512_set1_epi32(0x55555555), pairs = _mm512_set1_epi32(0x33333333);
  for (std::int64_t w = 0; w < count; w += kLanes) {
    __m512i n[kGroupsAtOnce][4];
    for (int g = 0; g < groups; ++g) {
      const std::uint32_t(*s)[kWordRoom] = words + kGroup * g;
      const __m512i a = _mm512_loadu_si512(s[0] + w), b = _mm512_loadu_si512(s[1] + w);
      const __m512i c = _mm512_loadu_si512(s[2] + w), d = _mm512_loadu_si512(s[3] + w);
      // 0xCA: where the mask is set the second, elsewhere the third
      const __m512i ab0 = _mm512_ternarylogic_epi32(even, a, _mm512_slli_epi32(b, 1), 0xCA);
      const __m512i ab1 = _mm512_ternarylogic_epi32(even, _mm512_srli_epi32(a, 1), b, 0xCA);
      const __m512i cd0 = _mm512_ternarylogic_epi32(even, c, _mm512_slli_epi32(d, 1), 0xCA);
      const __m512i cd1 = _mm512_ternarylogic_epi32(even, _mm512_srli_epi32(c, 1), d, 0xCA);
      n[g][0] = _mm512_ternarylogic_epi32(pairs, ab0, _mm512_slli_epi32(cd0, 2), 0xCA);
      n[g][1] = _mm512_ternarylogic_epi32(pairs, ab1, _mm512_slli_epi32(cd1, 2), 0xCA);
      n[g][2] = _mm512_ternarylogic_epi32(pairs, _mm512_srli_epi32(ab0, 2), cd0, 0xCA);
      n[g][3] = _mm512_ternarylogic_epi32(pairs, _mm512_srli_epi32(ab1, 2), cd1, 0xCA);
    }
    std::int32_t* at = sums + 32 * w;
    if (groups == kGroupsAtOnce) {
      const __m512i t0 = _mm512_load_si512(tables[0]), t1 = _mm512_load_si512(tables[1]);
      const __m512i t2 = _mm512_load_si512(tables[2]), t3 = _mm512_load_si512(tables[3]);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        __m512i i0 = n[0][m], i1 = n[1][m], i2 = n[2][m], i3 = n[3][m];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          std::int32_t* p = at + kLanes * (4 * j + m);
          const __m512i x = _mm512_add_epi32(_mm512_permutexvar_epi32(i0, t0),
                                             _mm512_permutexvar_epi32(i1, t1));
          const __m512i y = _mm512_add_epi32(_mm512_permutexvar_epi32(i2, t2),
                                             _mm512_permutexvar_epi32(i3, t3));
          _mm512_store_si512(p, _mm512_add_epi32(_mm512_load_si512(p), _mm512_add_epi32(x, y)));
          i0 = _mm512_srli_epi32(i0, 4);
          i1 = _mm512_srli_epi32(i1, 4);
          i2 = _mm512_srli_epi32(i2, 4);
          i3 = _mm512_srli_epi32(i3, 4);
        }
      }
    } else {
      for (int g = 0; g < groups; ++g) {
        const __m512i t = _mm512_load_si512(tables[g]);
        for (int m = 0; m < 4; ++m) {
          __m512i i = n[g][m];
          for (int j = 0; j < 8; ++j) {
            std::int32_t* p = at + kLanes * (4 * j + m);
            _mm512_store_si512(
                p, _mm512_add_epi32(_mm512_load_si512(p), _mm512_permutexvar_epi32(i, t)));
            i = _mm512_srli_epi32(i, 4);
          }
        }
      }
    }
  }
#elif defined(__AVX2__)
  for (std::int64_t w = 0; w < count; w += kLanes) {
    for (int g = 0; g < groups; ++g) {
      const std::uint32_t(*s)[kWordRoom] = words + kGroup * g;
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s[0] + w));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s[1] + w));
      const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s[2] + w));
      const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(tables[g]));
      const __m256i ones = _mm256_set1_epi32(0x11111111);
      for (int m = 0; m < 4; ++m) {
        const __m128i by = _mm_cvtsi32_si128(m);
        __m256i i = _mm256_or_si256(
            _mm256_and_si256(_mm256_srl_epi32(a, by), ones),
            _mm256_or_si256(
                _mm256_slli_epi32(_mm256_and_si256(_mm256_srl_epi32(b, by), ones), 1),
                _mm256_slli_epi32(_mm256_and_si256(_mm256_srl_epi32(c, by), ones), 2)));
        for (int j = 0; j < 8; ++j) {
          __m256i* p = reinterpret_cast<__m256i*>(sums + 32 * w + kLanes * (4 * j + m));
          _mm256_store_si256(
              p, _mm256_add_epi32(_mm256_load_si256(p), _mm256_permutevar8x32_epi32(table, i)));
          i = _mm256_srli_epi32(i, 4);
        }
      }
    }
  }
#else
  for (int g = 0; g < groups; ++g) {
    const std::uint32_t(*s)[kWordRoom] = words + kGroup * g;
    const std::int32_t* table = tables[g];
    for (std::int64_t w = 0; w < count; ++w) {
      for (int m = 0; m < 4; ++m) {
        const std::uint32_t ones = 0x11111111u;
        const std::uint32_t n = ((s[0][w] >> m) & ones) | ((s[1][w] >> m) & ones) << 1 |
                                ((s[2][w] >> m) & ones) << 2 | ((s[3][w] >> m) & ones) << 3;
        for (int j = 0; j < 8; ++j) sums[32 * w + 4 * j + m] += table[n >> (4 * j) & 15u];
      }
    }
  }
#endif
}

// out[i] = the sum of element i; `count` words.
inline void natural_order(std::int32_t* out, const std::int32_t* sums, std::int64_t count) {
  for (std::int64_t w = 0; w < count; w += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 32; ++i) {
        out[32 * (w + lane) + i] = sums[32 * w + kLanes * i + lane];
      }
    }
  }
}

}  // namespace
}  // namespace FK_ISA
}  // namespace fedkernels
