// Runs of consecutive blocks of Philox4x32-10, several counters at a time. Included by files that are
// compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "word_vectors.h"

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

#if defined(FK_VECTORS)
// The keys of all rounds of one seed.
struct Schedule {
  std::uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

inline void schedule_keys(std::uint64_t seed, Schedule* schedule) {
  for (std::uint32_t r = 0; r < kPhiloxRounds; ++r) {
    schedule->k0[r] = static_cast<std::uint32_t>(seed) + r * kPhiloxW0;
    schedule->k1[r] = static_cast<std::uint32_t>(seed >> 32) + r * kPhiloxW1;
  }
}

// Words of kVector / 2 blocks in `pair_order`: word i of each in the lower half of a pair of word[i].
struct Blocks {
  Words word[4];
};

// The words of S such sets of blocks: first, first + 1, ...
//
// The multiplication reads the lower half of a pair and fills all of it, so the product's two halves
// are the next words after one shift, and what an upper half holds otherwise is never looked at. One
// set alone would wait for its multiplications most of the time.
template <int S>
inline void philox_sets(const Schedule& schedule, std::uint64_t tensor_id, std::uint64_t first,
                        Blocks* blocks) {
  const Words m0 = all_pairs(kPhiloxM0), m1 = all_pairs(kPhiloxM1);
  Words c0[S], c1[S], c2[S], c3[S];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
    c0[s] = add_pairs(all_pairs(first + static_cast<std::uint64_t>(s * (kVector / 2))),
                      pair_order());
    c1[s] = upper(c0[s]);
    c2[s] = all_pairs(tensor_id);
    c3[s] = upper(c2[s]);
  }
#pragma GCC unroll 10
  for (int r = 0; r < kPhiloxRounds; ++r) {
    const Words k0 = all_words(schedule.k0[r]), k1 = all_words(schedule.k1[r]);
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const Words p0 = multiply_pairs(m0, c0[s]), p1 = multiply_pairs(m1, c2[s]);
      c0[s] = exclusive(upper(p1), c1[s], k0);
      c2[s] = exclusive(upper(p0), c3[s], k1);
      c1[s] = p1;
      c3[s] = p0;
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) blocks[s] = {{c0[s], c1[s], c2[s], c3[s]}};
}

// Writes the words of S sets in the natural order.
template <int S>
inline void write_sets(const Schedule& schedule, std::uint64_t tensor_id, std::uint64_t first,
                       std::uint32_t* out) {
  Blocks blocks[S];
  philox_sets<S>(schedule, tensor_id, first, blocks);
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s, out += 2 * kVector) {
    const Words x01 = lower(blocks[s].word[0], blocks[s].word[1]);
    const Words x23 = lower(blocks[s].word[2], blocks[s].word[3]);
    store_words(out, first_pairs(x01, x23));
    store_words(out + kVector, last_pairs(x01, x23));
  }
}
#endif

// Writes the words of blocks first, first + 1, ...: 4 * blocks words, and up to kPadding more.
inline void philox_blocks(std::uint64_t seed, std::uint64_t tensor_id, std::uint64_t first,
                          std::int64_t blocks, std::uint32_t* out) {
#if defined(FK_VECTORS)
  Schedule schedule;
  schedule_keys(seed, &schedule);
  constexpr std::int64_t kSet = kVector / 2;
  std::int64_t b = 0;
  for (; b + kSet < blocks; b += 2 * kSet, out += 4 * kVector) {
    write_sets<2>(schedule, tensor_id, first + static_cast<std::uint64_t>(b), out);
  }
  if (b < blocks) write_sets<1>(schedule, tensor_id, first + static_cast<std::uint64_t>(b), out);
#else
  const std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  const std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
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
