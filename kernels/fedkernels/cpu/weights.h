// Weights of three widths as float32, and back with one rounding to nearest even. Included by files
// that are compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "probes.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fedkernels {
namespace FK_ISA {
namespace {

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint16_t to_bfloat16(float value) {
  const std::uint32_t u = bits_of(value);
  const std::uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const std::uint32_t nan = (u >> 16) | 0x40u;
  return static_cast<std::uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

inline float from_float16(std::uint16_t half) {
#if defined(__aarch64__)
  __fp16 value;
  std::memcpy(&value, &half, sizeof value);
  return value;
#elif defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const std::uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
  if (magnitude < 0x400u) {  // subnormal: a multiple of 2^-24
    return float_of(bits_of(static_cast<float>(magnitude) * 0x1p-24f) | sign);
  }
  const std::uint32_t rebias = magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u;
  return float_of(((magnitude << 13) + rebias) | sign);
#endif
}

inline std::uint16_t to_float16(float value) {
#if defined(__aarch64__)
  const __fp16 half = static_cast<__fp16>(value);
  std::uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
#elif defined(__F16C__)
  return static_cast<std::uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const std::uint32_t u = bits_of(value), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  std::uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // rounds beyond the largest number
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: 0.5 has the last place that rounds it
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<std::uint16_t>(half | sign);
#endif
}

// Reads weights `first` .. first + count - 1 as float32.
inline void load(float* out, const void* data, Dtype dtype, std::int64_t first, std::int64_t count) {
  if (dtype == Dtype::float32) {
    std::memcpy(out, static_cast<const float*>(data) + first, count * sizeof(float));
    return;
  }
  const std::uint16_t* in = static_cast<const std::uint16_t*>(data) + first;
  if (dtype == Dtype::bfloat16) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = float_of(std::uint32_t{in[i]} << 16);
    return;
  }
  std::int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
#endif
  for (; i < count; ++i) out[i] = from_float16(in[i]);
}

// Writes float32 values as weights `first` .. first + count - 1.
inline void store(void* data, const float* in, Dtype dtype, std::int64_t first, std::int64_t count) {
  if (dtype == Dtype::float32) {
    std::memcpy(static_cast<float*>(data) + first, in, count * sizeof(float));
    return;
  }
  std::uint16_t* out = static_cast<std::uint16_t*>(data) + first;
  if (dtype == Dtype::bfloat16) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(in[i]);
    return;
  }
  std::int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; ++i) out[i] = to_float16(in[i]);
}

}  // namespace
}  // namespace FK_ISA
}  // namespace fedkernels
