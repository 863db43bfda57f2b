// Vectors of 32-bit words and of float32 under one set of names, on x86. FK_VECTORS tells whether there
// are any. Included by files that are compiled once for each instruction set.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#define FK_VECTORS 1
#endif

namespace fedkernels {
namespace FK_ISA {
namespace {

#if defined(__AVX512F__)
using Words = __m512i;
using Floats = __m512;
constexpr int kVector = 16;  // words of a vector

inline Words load_words(const void* from) { return _mm512_loadu_si512(from); }
inline void store_words(void* to, Words a) { _mm512_storeu_si512(to, a); }
inline Words all_words(std::uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
inline Words all_pairs(std::uint64_t a) { return _mm512_set1_epi64(static_cast<long long>(a)); }
inline Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words subtract(Words a, Words b) { return _mm512_sub_epi32(a, b); }
inline Words multiply(Words a, Words b) { return _mm512_mullo_epi32(a, b); }
inline Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
inline Words either(Words a, Words b) { return _mm512_or_si512(a, b); }
inline Words exclusive(Words a, Words b, Words c) {
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}
// a, inverted where b and c are set
inline Words inverted(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0x78); }
template <int N> inline Words left(Words a) { return _mm512_slli_epi32(a, N); }
template <int N> inline Words right(Words a) { return _mm512_srli_epi32(a, N); }
template <int N> inline Words signed_right(Words a) { return _mm512_srai_epi32(a, N); }
// Pairs of words as integers of 64 bits: a sum, the product of the lower words, the upper words.
inline Words add_pairs(Words a, Words b) { return _mm512_add_epi64(a, b); }
inline Words multiply_pairs(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words upper(Words a) { return _mm512_srli_epi64(a, 32); }
// The lower words of the pairs of a, and after each that of b.
inline Words lower(Words a, Words b) {
  return _mm512_mask_shuffle_epi32(a, 0xAAAA, b, _MM_PERM_CCAA);
}
// Of every quarter the first half, or the second, of a and b by turns; of pairs, or of words.
inline Words first_pairs(Words a, Words b) { return _mm512_unpacklo_epi64(a, b); }
inline Words last_pairs(Words a, Words b) { return _mm512_unpackhi_epi64(a, b); }
inline Words first_words(Words a, Words b) { return _mm512_unpacklo_epi32(a, b); }
inline Words last_words(Words a, Words b) { return _mm512_unpackhi_epi32(a, b); }
// Pair 2 L + p is number 4 p + L: `first_*` and `last_*` make of that the natural order.
inline Words pair_order() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }

inline Words words_of(Floats a) { return _mm512_castps_si512(a); }
inline Floats floats_of(Words a) { return _mm512_castsi512_ps(a); }
inline Floats converted(Words a) { return _mm512_cvtepi32_ps(a); }
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline void store_floats(float* to, Floats a) { _mm512_storeu_ps(to, a); }
inline Floats all_floats(float a) { return _mm512_set1_ps(a); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats square_root(Floats a) { return _mm512_sqrt_ps(a); }
// b where bit 30 of the chooser is set, else a.
inline void exchange(Words chooser, Floats* a, Floats* b) {
  const __mmask16 set = _mm512_test_epi32_mask(chooser, _mm512_set1_epi32(0x40000000));
  const Floats first = _mm512_mask_blend_ps(set, *a, *b);
  *b = _mm512_mask_blend_ps(set, *b, *a);
  *a = first;
}
// sums[i] += factor * a[i], the product and the sum each rounded.
inline void add_products(double* sums, double factor, Floats a) {
  const __m512d f = _mm512_set1_pd(factor);
  const __m512d low = _mm512_mul_pd(f, _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
  const __m512d high = _mm512_mul_pd(f, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}

#elif defined(__AVX2__)
using Words = __m256i;
using Floats = __m256;
constexpr int kVector = 8;

inline Words load_words(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline void store_words(void* to, Words a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a); }
inline Words all_words(std::uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
inline Words all_pairs(std::uint64_t a) { return _mm256_set1_epi64x(static_cast<long long>(a)); }
inline Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline Words subtract(Words a, Words b) { return _mm256_sub_epi32(a, b); }
inline Words multiply(Words a, Words b) { return _mm256_mullo_epi32(a, b); }
inline Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
inline Words either(Words a, Words b) { return _mm256_or_si256(a, b); }
inline Words exclusive(Words a, Words b, Words c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
inline Words inverted(Words a, Words b, Words c) {
  return _mm256_xor_si256(a, _mm256_and_si256(b, c));
}
template <int N> inline Words left(Words a) { return _mm256_slli_epi32(a, N); }
template <int N> inline Words right(Words a) { return _mm256_srli_epi32(a, N); }
template <int N> inline Words signed_right(Words a) { return _mm256_srai_epi32(a, N); }
inline Words add_pairs(Words a, Words b) { return _mm256_add_epi64(a, b); }
inline Words multiply_pairs(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words upper(Words a) { return _mm256_srli_epi64(a, 32); }
inline Words lower(Words a, Words b) {
  return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA);
}
inline Words first_pairs(Words a, Words b) { return _mm256_unpacklo_epi64(a, b); }
inline Words last_pairs(Words a, Words b) { return _mm256_unpackhi_epi64(a, b); }
inline Words first_words(Words a, Words b) { return _mm256_unpacklo_epi32(a, b); }
inline Words last_words(Words a, Words b) { return _mm256_unpackhi_epi32(a, b); }
inline Words pair_order() { return _mm256_setr_epi64x(0, 2, 1, 3); }

inline Words words_of(Floats a) { return _mm256_castps_si256(a); }
inline Floats floats_of(Words a) { return _mm256_castsi256_ps(a); }
inline Floats converted(Words a) { return _mm256_cvtepi32_ps(a); }
inline Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
inline void store_floats(float* to, Floats a) { _mm256_storeu_ps(to, a); }
inline Floats all_floats(float a) { return _mm256_set1_ps(a); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats square_root(Floats a) { return _mm256_sqrt_ps(a); }
inline void exchange(Words chooser, Floats* a, Floats* b) {
  const Floats sign = floats_of(left<1>(chooser));
  const Floats first = _mm256_blendv_ps(*a, *b, sign);
  *b = _mm256_blendv_ps(*b, *a, sign);
  *a = first;
}
inline void add_products(double* sums, double factor, Floats a) {
  const __m256d f = _mm256_set1_pd(factor);
  const __m256d low = _mm256_mul_pd(f, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
  const __m256d high = _mm256_mul_pd(f, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), low));
  _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), high));
}
#endif

}  // namespace
}  // namespace FK_ISA
}  // namespace fedkernels
