// Runs of consecutive blocks of Philox4x32-10, several counters at a time. Included by files that are
// compiled once for each instruction set.
//
// Each vector lane is 64 bits wide: the multiplication reads its low half and fills all of it, so the
// product's two halves are the next words after one shift, and what the high half holds otherwise is
// never looked at.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fedkernels {
namespace FK_ISA {
namespace {

constexpr std::uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr std::uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr std::uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Blocks are made in runs of 8, so the caller's buffer has room for this many words more.
constexpr int kPadding = 28;

// Writes the words of blocks first, first + 1, ...: 4 * blocks words, and up to kPadding more.
inline void philox_blocks(std::uint64_t seed, std::uint64_t tensor_id, std::uint64_t first,
                          std::int64_t blocks, std::uint32_t* out) {
  const std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  const std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
#if defined(__AVX512F__)
  // lane 2L + p holds block 4p + L, so that unpacking 64-bit pairs leaves the blocks in order
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF);
  for (std::int64_t b = 0; b < blocks; b += 8, out += 32) {
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(first + b)), order);
    __m512i c1 = _mm512_srli_epi64(c0, 32);
    __m512i c2 = _mm512_set1_epi64(static_cast<long long>(tensor_id));
    __m512i c3 = _mm512_srli_epi64(c2, 32);
#pragma GCC unroll 10
    for (std::uint32_t r = 0; r < kPhiloxRounds; ++r) {
      const __m512i k0 = _mm512_set1_epi32(static_cast<int>(key0 + r * kPhiloxW0));
      const __m512i k1 = _mm512_set1_epi32(static_cast<int>(key1 + r * kPhiloxW1));
      const __m512i p0 = _mm512_mul_epu32(m0, c0), p1 = _mm512_mul_epu32(m1, c2);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, k0, 0x96);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, k1, 0x96);
      c1 = p1;
      c3 = p0;
    }
    const __m512i x01 = _mm512_or_si512(_mm512_and_si512(c0, low), _mm512_slli_epi64(c1, 32));
    const __m512i x23 = _mm512_or_si512(_mm512_and_si512(c2, low), _mm512_slli_epi64(c3, 32));
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(x01, x23));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(x01, x23));
  }
#elif defined(__AVX2__)
  const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  for (std::int64_t b = 0; b < blocks; b += 4, out += 16) {
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<long long>(first + b)), order);
    __m256i c1 = _mm256_srli_epi64(c0, 32);
    __m256i c2 = _mm256_set1_epi64x(static_cast<long long>(tensor_id));
    __m256i c3 = _mm256_srli_epi64(c2, 32);
#pragma GCC unroll 10
    for (std::uint32_t r = 0; r < kPhiloxRounds; ++r) {
      const __m256i k0 = _mm256_set1_epi32(static_cast<int>(key0 + r * kPhiloxW0));
      const __m256i k1 = _mm256_set1_epi32(static_cast<int>(key1 + r * kPhiloxW1));
      const __m256i p0 = _mm256_mul_epu32(m0, c0), p1 = _mm256_mul_epu32(m1, c2);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), k0);
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), k1);
      c1 = p1;
      c3 = p0;
    }
    const __m256i x01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i x23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(x01, x23));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(x01, x23));
  }
#else
  constexpr int kLanes = 8;
  for (std::int64_t b = 0; b < blocks; b += kLanes, out += 4 * kLanes) {
    std::uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const std::uint64_t block = first + static_cast<std::uint64_t>(b + l);
      c0[l] = static_cast<std::uint32_t>(block);
      c1[l] = static_cast<std::uint32_t>(block >> 32);
      c2[l] = static_cast<std::uint32_t>(tensor_id);
      c3[l] = static_cast<std::uint32_t>(tensor_id >> 32);
    }
    for (std::uint32_t r = 0; r < kPhiloxRounds; ++r) {
      const std::uint32_t k0 = key0 + r * kPhiloxW0, k1 = key1 + r * kPhiloxW1;
      for (int l = 0; l < kLanes; ++l) {
        const std::uint64_t p0 = std::uint64_t{kPhiloxM0} * c0[l];
        const std::uint64_t p1 = std::uint64_t{kPhiloxM1} * c2[l];
        c0[l] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[l] ^ k0;
        c2[l] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[l] ^ k1;
        c1[l] = static_cast<std::uint32_t>(p1);
        c3[l] = static_cast<std::uint32_t>(p0);
      }
    }
    for (int l = 0; l < kLanes; ++l) {
      out[4 * l] = c0[l];
      out[4 * l + 1] = c1[l];
      out[4 * l + 2] = c2[l];
      out[4 * l + 3] = c3[l];
    }
  }
#endif
}

}  // namespace
}  // namespace FK_ISA
}  // namespace fedkernels
