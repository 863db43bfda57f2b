// The q of one tile of a probe of numbers (popcount, gaussian): in registers where there are vectors,
// else one by one. Included by files that are compiled once for each instruction set.
#pragma once

#include "probe_tiles.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

inline std::int32_t centred_popcount(std::uint32_t word) {
  word -= (word >> 1) & 0x55555555u;
  word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
  word = (word + (word >> 4)) & 0x0F0F0F0Fu;
  word += word >> 8;
  word += word >> 16;
  return static_cast<std::int32_t>(word & 0x3Fu) - 16;
}

#if defined(__FMA__) || defined(__aarch64__)
inline float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// As in ../reference/fma.py: the sum is rounded to odd, so that the last rounding is the only one.
inline float fma_(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, addend = c;
  const double total = product + addend;
  const double part = total - product;
  const double error = (product - (total - part)) + (addend - part);
  std::int64_t bits;
  std::memcpy(&bits, &total, sizeof bits);
  const bool finite = (bits & 0x7FF0000000000000) != 0x7FF0000000000000;
  const std::int64_t step = (error > 0) == (total > 0) ? 1 : -1;
  bits += finite && error != 0 && (bits & 1) == 0 ? step : 0;
  double odd;
  std::memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
}
#endif

// Box and Muller's map of ../reference/gaussian.py; two words in, two values out, in place.
inline void gaussian_pair(std::uint32_t first, std::uint32_t second, float* even, float* odd) {
  const std::uint32_t bits = bits_of(static_cast<float>(static_cast<std::int32_t>(first >> 1 | 1u)));
  const std::int32_t exponent = static_cast<std::int32_t>(bits - 0x3F3504F3u) >> 23;
  const float f = float_of(bits - (static_cast<std::uint32_t>(exponent) << 23)) - 1.0f;
  float log = 0x1.9df91ap-3f;
  log = fma_(log, f, -0x1.4c3cc0p-2f);
  log = fma_(log, f, 0x1.614c20p-2f);
  log = fma_(log, f, -0x1.978e38p-2f);
  log = fma_(log, f, 0x1.ff623cp-2f);
  log = fma_(log, f, -0x1.5559dcp-1f);
  log = fma_(log, f, 0x1.00007ap+0f);
  log = fma_(log, f, -0x1.fffffep+0f);
  const float squared = fma_(f, log, static_cast<float>(exponent - 31) * -0x1.62e430p+0f);
  const float radius = __builtin_sqrtf(squared);

  const std::int32_t angle = static_cast<std::int32_t>(second << 2) >> 7 | 1;
  const float x = static_cast<float>(angle) * 0x1p-25f;
  const float square = x * x;
  float cosine = fma_(-0x1.4e35dap-6f, square, 0x1.03ae64p-2f);
  cosine = fma_(cosine, square, -0x1.3bd38cp+0f);
  cosine = fma_(cosine, square, 0x1.fffffep-1f);
  cosine = float_of(bits_of(cosine) ^ (second & 0x80000000u));
  float sine = fma_(-0x1.2d9302p-8f, square, 0x1.465e92p-4f);
  sine = fma_(sine, square, -0x1.4abbbap-1f);
  sine = x * fma_(sine, square, 0x1.921fb6p+0f);
  const bool swap = (second & 0x40000000u) != 0;
  *even = radius * (swap ? sine : cosine);
  *odd = radius * (swap ? cosine : sine);
}

#if defined(FK_VECTORS)
// Sets of blocks that are made at once, and their elements: always a divisor of kTile.
#if defined(__AVX512F__)
constexpr int kSets = 4;
#else
constexpr int kSets = 2;  // 16 registers hold no more
#endif
constexpr std::int64_t kSetElements = 2 * kVector;
constexpr std::int64_t kGroupElements = kSets * kSetElements;

// What belongs to the elements of one set, in the order in which q arise: `even` has elements 0, 2, 0,
// 2, ... of blocks in `pair_order`, `odd` elements 1, 3, 1, 3, ... `interleave` makes it the natural one.
struct WordSet {
  Words even, odd;
};
struct FloatSet {
  Floats even, odd;
};

inline void interleave(void* out, const WordSet& set) {
  store_words(out, first_words(set.even, set.odd));
  store_words(static_cast<std::uint32_t*>(out) + kVector, last_words(set.even, set.odd));
}

inline void interleave(void* out, const FloatSet& set) {
  interleave(out, WordSet{words_of(set.even), words_of(set.odd)});
}

// places[i]: where among the 2 kVector numbers of a set, even ones first, element i is.
inline void set_places(std::uint32_t* places) {
  for (std::uint32_t i = 0; i < kSetElements; ++i) places[i] = i;
  interleave(places, WordSet{load_words(places), load_words(places + kVector)});
}

// words[s]: of the elements from 4 * block on, kSetElements each. Not inlined: the constants of the
// caller's own arithmetic would take the registers that the generator needs.
[[gnu::noinline]] void group_words(const Schedule& schedule, std::uint64_t tensor_id,
                                   std::uint64_t block, WordSet* words) {
  Blocks blocks[kSets];
  philox_sets<kSets>(schedule, tensor_id, block, blocks);
#pragma GCC unroll 4
  for (int s = 0; s < kSets; ++s) {
    const Words* w = blocks[s].word;
    words[s] = {lower(w[0], w[2]), lower(w[1], w[3])};
  }
}

// Bits that are set in each word.
inline Words popcount(Words a) {
#if defined(__AVX512VPOPCNTDQ__)
  return _mm512_popcnt_epi32(a);
#else
  const Words half = all_words(0x33333333u), quarter = all_words(0x0F0F0F0Fu);
  a = subtract(a, both(right<1>(a), all_words(0x55555555u)));
  a = add(both(a, half), both(right<2>(a), half));
  a = both(add(a, right<4>(a)), quarter);
  return right<24>(multiply(a, all_words(0x01010101u)));
#endif
}

// Highest power first; see ../reference/gaussian.py.
constexpr float kLog[] = {0x1.9df91ap-3f,  -0x1.4c3cc0p-2f, 0x1.614c20p-2f,  -0x1.978e38p-2f,
                          0x1.ff623cp-2f,  -0x1.5559dcp-1f, 0x1.00007ap+0f, -0x1.fffffep+0f};
constexpr float kCosine[] = {-0x1.4e35dap-6f, 0x1.03ae64p-2f, -0x1.3bd38cp+0f, 0x1.fffffep-1f};
constexpr float kSine[] = {-0x1.2d9302p-8f, 0x1.465e92p-4f, -0x1.4abbbap-1f, 0x1.921fb6p+0f};

// gaussian_pair of the words of S sets, operation by operation, side by side.
template <int S>
inline void gaussian_sets(const WordSet* words, FloatSet* z) {
  Floats f[S], log[S], whole[S], x[S], square[S], cosine[S], sine[S];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
    const Words bits = words_of(converted(either(right<1>(words[s].even), all_words(1u))));
    const Words exponent = signed_right<23>(subtract(bits, all_words(0x3F3504F3u)));
    f[s] = subtract(floats_of(subtract(bits, left<23>(exponent))), all_floats(1.0f));
    whole[s] = multiply(converted(subtract(exponent, all_words(31u))),
                        all_floats(-0x1.62e430p+0f));
    log[s] = all_floats(kLog[0]);
    const Words angle = either(signed_right<7>(left<2>(words[s].odd)), all_words(1u));
    x[s] = multiply(converted(angle), all_floats(0x1p-25f));
    square[s] = multiply(x[s], x[s]);
    cosine[s] = all_floats(kCosine[0]);
    sine[s] = all_floats(kSine[0]);
  }
#pragma GCC unroll 8
  for (int i = 1; i < 8; ++i) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      log[s] = multiply_add(log[s], f[s], all_floats(kLog[i]));
      if (i >= 4) continue;
      cosine[s] = multiply_add(cosine[s], square[s], all_floats(kCosine[i]));
      sine[s] = multiply_add(sine[s], square[s], all_floats(kSine[i]));
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
    cosine[s] = floats_of(inverted(words_of(cosine[s]), words[s].odd, all_words(0x80000000u)));
    sine[s] = multiply(x[s], sine[s]);
    exchange(words[s].odd, &cosine[s], &sine[s]);
    const Floats radius = square_root(multiply_add(f[s], log[s], whole[s]));
    z[s] = {multiply(radius, cosine[s]), multiply(radius, sine[s])};
  }
}

// q of popcount, or gaussian, for kSets sets from element 4 * block on.
inline void popcount_group(const Schedule& schedule, std::uint64_t tensor_id, std::uint64_t block,
                           FloatSet* q) {
  WordSet words[kSets];
  group_words(schedule, tensor_id, block, words);
  const Words centre = all_words(16u);
#pragma GCC unroll 4
  for (int s = 0; s < kSets; ++s) {
    q[s] = {converted(subtract(popcount(words[s].even), centre)),
            converted(subtract(popcount(words[s].odd), centre))};
  }
}

inline void gaussian_group(const Schedule& schedule, std::uint64_t tensor_id, std::uint64_t block,
                           FloatSet* z) {
  WordSet words[kSets];
  group_words(schedule, tensor_id, block, words);
#pragma GCC unroll 2
  for (int s = 0; s < kSets; s += 2) gaussian_sets<2>(words + s, z + s);
}
#endif

// Writes q of popcount or gaussian for the elements from aligned(tile.first) on; `values` has
// kValueRoom elements.
inline void tile_values(std::uint64_t seed, const Stream& stream, const Tile& tile, float* values) {
#if defined(FK_VECTORS)
  Schedule schedule;
  schedule_keys(seed, &schedule);
  const std::int64_t begin = aligned(tile.first), made = tile.first + tile.count - begin;
  std::uint64_t block = static_cast<std::uint64_t>(begin / 4);
  for (std::int64_t i = 0; i < made; i += kGroupElements, block += kGroupElements / 4) {
    FloatSet q[kSets];
    if (stream.probe == Probe::popcount) {
      popcount_group(schedule, stream.tensor_id, block, q);
    } else {
      gaussian_group(schedule, stream.tensor_id, block, q);
    }
    for (int s = 0; s < kSets; ++s) interleave(values + i + s * kSetElements, q[s]);
  }
#else
  alignas(64) std::uint32_t words[kValueRoom];
  const std::int64_t count = tile_words(seed, stream, tile, words);
  if (stream.probe == Probe::popcount) {
    for (std::int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<float>(centred_popcount(words[i]));
    }
  } else {
    for (std::int64_t i = 0; i < count / 2; ++i) {
      gaussian_pair(words[2 * i], words[2 * i + 1], values + 2 * i, values + 2 * i + 1);
    }
  }
#endif
}

}  // namespace
}  // namespace FK_ISA
}  // namespace fedkernels
