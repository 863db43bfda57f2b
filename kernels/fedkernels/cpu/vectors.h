// Vectors of fp32 lanes for one instruction set, in the compiler's vector extensions, with loads and
// stores that widen bf16 and round back to it. Include it only in files that are compiled once for
// each set (isa.h): everything has internal linkage and lives in the set's own namespace.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "training.h"

namespace fedkernels::FK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(kLanes * 2)));

static inline Floats broadcast(float value) { return value - Floats{}; }

// a * b + c with one rounding where the set has the instruction; two elsewhere.
static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

static inline Floats select(Ints mask, Floats yes, Floats no) {
  return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}

static inline Floats maximum(Floats a, Floats b) { return select(a > b, a, b); }

static inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

static inline float largest(Floats v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

static inline Floats widen(Halves h) {
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}

// To the nearest bf16, ties to even; NaN stays NaN.
static inline Halves narrow(Floats v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  const Words nan = (Words)(v != v);
  return __builtin_convertvector((nan & quiet) | (~nan & rounded), Halves);
}

static inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline Floats load(const Bf16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return widen(h);
}

static inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

static inline void store(Bf16* p, Floats v) {
  const Halves h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}

// The first `count` < kLanes elements, the other lanes `rest`.
template <typename T>
static inline Floats load_some(const T* p, std::int64_t count, float rest = 0) {
  T lanes[kLanes];
  std::memset(lanes, 0, sizeof lanes);
  std::memcpy(lanes, p, static_cast<std::size_t>(count) * sizeof(T));
  Floats v = load(lanes);
  for (int i = 0; i < kLanes; ++i) {
    if (i >= count) v[i] = rest;
  }
  return v;
}

template <typename T>
static inline void store_some(T* p, Floats v, std::int64_t count) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<std::size_t>(count) * sizeof(T));
}

// v rounded as a store to T would round it.
static inline Floats rounded_to(const float*, Floats v) { return v; }
static inline Floats rounded_to(const Bf16*, Floats v) { return widen(narrow(v)); }

static inline float to_float(float value) { return value; }
static inline float to_float(Bf16 value) {
  const std::uint32_t bits = std::uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

static inline void assign(float* p, float value) { *p = value; }
static inline void assign(Bf16* p, float value) { store_some(p, broadcast(value), 1); }

// e^x within 2 ulp; 0 below -87.3 (denormal results are not worth their time here), finite above 88.
// x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts (Cody and Waite), so that r is exact to
// fp32; e^r is its Taylor polynomial of degree 7 (remainder below 6e-9).
static inline Floats exponential(Floats x) {
  const Ints vanishes = x < -87.3f;
  x = select(vanishes, broadcast(-87.3f), x);
  x = select(x > 88.0f, broadcast(88.0f), x);
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the significand.
  const Floats shift = broadcast(12582912.0f);
  const Floats shifted = multiply_add(x, broadcast(1.44269504f), shift);
  const Floats n = shifted - shift;
  Floats r = multiply_add(n, broadcast(-0.693145751953125f), x);
  r = multiply_add(n, broadcast(-1.42860682030941723e-6f), r);
  Floats p = broadcast(1.0f / 5040);
  p = multiply_add(p, r, broadcast(1.0f / 720));
  p = multiply_add(p, r, broadcast(1.0f / 120));
  p = multiply_add(p, r, broadcast(1.0f / 24));
  p = multiply_add(p, r, broadcast(1.0f / 6));
  p = multiply_add(p, r, broadcast(0.5f));
  p = multiply_add(p, r, broadcast(1.0f));
  p = multiply_add(p, r, broadcast(1.0f));
  const Words power = (Words)p + ((Words)shifted << 23);
  return select(vanishes, Floats{}, (Floats)power);
}

}  // namespace fedkernels::FK_ISA
