// Registers of float32 for the product of a few rows, and its partial sums.
#pragma once

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

}  // namespace
}  // namespace FK_ISA
}  // namespace fedkernels
