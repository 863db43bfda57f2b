// weight + factor * sum_k c_k q_k with one rounding (../reference/replay.py). A tile of sums stays in
// the first-level cache while all seeds pass over it; weights are read and written once.
#include "probe_values.h"
#include "signed_sums.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

// Seeds that may be added in 32 bits when coefficients are halves of 16 bits: 2048 * 16 * 65535 < 2^31.
constexpr std::int64_t kSegment = 2048;

// Element by element, sum_k coefficient(k) q_k of a probe of bits, from aligned(tile.first) on.
template <typename Coefficient>
void bit_sums(std::int32_t* sums, const Tile& tile, const Stream& stream,
              const std::uint64_t* seeds, Coefficient coefficient, std::int64_t count) {
  alignas(64) std::int32_t mixed[kSumRoom];
  // zero: the vectors that follow the last whole block are computed and not used
  alignas(64) std::uint32_t words[kSeedsAtOnce][kWordRoom];
  std::memset(words, 0, sizeof words);
  std::memset(mixed, 0, sizeof mixed);
  std::int64_t made = 0;
  for (std::int64_t k = 0; k < count; k += kSeedsAtOnce) {
    std::int32_t c[kSeedsAtOnce] = {};
    const int taken = static_cast<int>(count - k < kSeedsAtOnce ? count - k : kSeedsAtOnce);
    for (int i = 0; i < taken; ++i) {
      c[i] = coefficient(k + i);
      made = tile_bits(seeds[k + i], stream, tile, words[i]);
    }
    add_signed_sums(mixed, words, c, (taken + kGroup - 1) / kGroup * kGroup, made);
  }
  natural_order(sums, mixed, made);
}

#if defined(FK_VECTORS)
// Seeds whose keys are kept at hand while they pass over a tile.
constexpr std::int64_t kScheduled = 64;

inline std::int64_t schedule_some(Schedule* schedules, const std::uint64_t* seeds,
                                  std::int64_t count) {
  const std::int64_t taken = count < kScheduled ? count : kScheduled;
  for (std::int64_t i = 0; i < taken; ++i) schedule_keys(seeds[i], schedules + i);
  return taken;
}

inline WordSet load_set(const std::int32_t* from) {
  return {load_words(from), load_words(from + kVector)};
}

// The same of popcount. Each q is its popcount less 16, so sums begin at -16 sum_k coefficient(k);
// they may leave 32 bits on the way, for they come back.
template <typename Coefficient>
void popcount_sums(std::int32_t* sums, const Tile& tile, const Stream& stream,
                   const std::uint64_t* seeds, Coefficient coefficient, std::int64_t count) {
  const std::int64_t begin = aligned(tile.first), made = tile.first + tile.count - begin;
  const std::uint64_t block = static_cast<std::uint64_t>(begin / 4);
  std::uint32_t start = 0;
  for (std::int64_t k = 0; k < count; ++k) {
    start -= 16u * static_cast<std::uint32_t>(coefficient(k));
  }
  const std::int64_t end = (made + kGroupElements - 1) / kGroupElements * kGroupElements;
  for (std::int64_t i = 0; i < end; i += kVector) store_words(sums + i, all_words(start));
  Schedule schedules[kScheduled];
  std::int32_t c[kScheduled];
  for (std::int64_t k = 0, taken; k < count; k += taken) {
    taken = schedule_some(schedules, seeds + k, count - k);
    for (std::int64_t n = 0; n < taken; ++n) c[n] = coefficient(k + n);
    for (std::int64_t i = 0; i < end; i += kGroupElements) {
      WordSet total[kSets];
      for (int s = 0; s < kSets; ++s) total[s] = load_set(sums + i + s * kSetElements);
      for (std::int64_t n = 0; n < taken; ++n) {
        WordSet words[kSets];
        group_words(schedules[n], stream.tensor_id, block + static_cast<std::uint64_t>(i / 4),
                    words);
        const Words factor = all_words(static_cast<std::uint32_t>(c[n]));
#pragma GCC unroll 4
        for (int s = 0; s < kSets; ++s) {
          total[s].even = add(total[s].even, multiply(factor, popcount(words[s].even)));
          total[s].odd = add(total[s].odd, multiply(factor, popcount(words[s].odd)));
        }
      }
      for (int s = 0; s < kSets; ++s) {
        store_words(sums + i + s * kSetElements, total[s].even);
        store_words(sums + i + s * kSetElements + kVector, total[s].odd);
      }
    }
  }
  for (std::int64_t i = 0; i < end; i += kSetElements) interleave(sums + i, load_set(sums + i));
}
#else
template <typename Coefficient>
void popcount_sums(std::int32_t* sums, const Tile& tile, const Stream& stream,
                   const std::uint64_t* seeds, Coefficient coefficient, std::int64_t count) {
  alignas(64) std::uint32_t words[kValueRoom];
  std::memset(sums, 0, kTile * sizeof(std::int32_t));
  for (std::int64_t k = 0; k < count; ++k) {
    const std::int64_t made = tile_words(seeds[k], stream, tile, words);
    const std::int32_t c = coefficient(k);
    for (std::int64_t i = 0; i < made; ++i) sums[i] += c * centred_popcount(words[i]);
  }
}
#endif

// sums: kSumRoom, in 32 bits, which must hold them.
template <typename Coefficient>
void narrow_sums(std::int32_t* sums, const Tile& tile, const Stream& stream,
                 const std::uint64_t* seeds, Coefficient coefficient, std::int64_t count) {
  if (is_bits(stream)) {
    bit_sums(sums, tile, stream, seeds, coefficient, count);
  } else {
    popcount_sums(sums, tile, stream, seeds, coefficient, count);
  }
}

struct Whole {
  const std::int32_t* coefficients;
  std::int32_t operator()(std::int64_t k) const { return coefficients[k]; }
};

struct LowHalf {
  const std::int32_t* coefficients;
  std::int32_t operator()(std::int64_t k) const { return coefficients[k] & 0xFFFF; }
};

struct HighHalf {
  const std::int32_t* coefficients;
  std::int32_t operator()(std::int64_t k) const { return coefficients[k] >> 16; }
};

// The same in 64 bits, from two sums in 32 bits: c = 2^16 * high + low.
void wide_sums(std::int64_t* sums, const Tile& tile, const Stream& stream,
               const std::uint64_t* seeds, const std::int32_t* coefficients, std::int64_t count) {
  alignas(64) std::int32_t low[kSumRoom], high[kSumRoom];
  std::memset(sums, 0, kTile * sizeof(std::int64_t));
  const std::int64_t made = tile.first - aligned(tile.first) + tile.count;
  for (std::int64_t k = 0; k < count; k += kSegment) {
    const std::int64_t taken = count - k < kSegment ? count - k : kSegment;
    narrow_sums(low, tile, stream, seeds + k, LowHalf{coefficients + k}, taken);
    narrow_sums(high, tile, stream, seeds + k, HighHalf{coefficients + k}, taken);
    for (std::int64_t i = 0; i < made; ++i) sums[i] += low[i] + std::int64_t{high[i]} * 65536;
  }
}

#if defined(FK_VECTORS)
// Element by element in the order of the seeds, each product and each sum rounded.
void gaussian_sums(double* sums, const Tile& tile, const Stream& stream, const std::uint64_t* seeds,
                   const std::int32_t* coefficients, std::int64_t count) {
  const std::int64_t begin = aligned(tile.first), made = tile.first + tile.count - begin;
  const std::uint64_t block = static_cast<std::uint64_t>(begin / 4);
  alignas(64) double mixed[kTile];
  std::memset(mixed, 0, sizeof mixed);
  Schedule schedules[kScheduled];
  for (std::int64_t k = 0, taken; k < count; k += taken) {
    taken = schedule_some(schedules, seeds + k, count - k);
    for (std::int64_t i = 0; i < made; i += kGroupElements) {
      for (std::int64_t n = 0; n < taken; ++n) {
        WordSet words[kSets];
        group_words(schedules[n], stream.tensor_id, block + static_cast<std::uint64_t>(i / 4),
                    words);
        const double c = coefficients[k + n];
#pragma GCC unroll 2
        for (int s = 0; s < kSets; s += 2) {
          FloatSet z[2];
          gaussian_sets<2>(words + s, z);
          for (int t = 0; t < 2; ++t) {
            double* at = mixed + i + (s + t) * kSetElements;
            add_products(at, c, z[t].even);
            add_products(at + kVector, c, z[t].odd);
          }
        }
      }
    }
  }
  std::uint32_t places[kSetElements];
  set_places(places);
  for (std::int64_t i = 0; i < made; ++i) {
    const std::int64_t set = i / kSetElements * kSetElements;
    sums[i] = mixed[set + places[i % kSetElements]];
  }
}
#else
void gaussian_sums(double* sums, const Tile& tile, const Stream& stream, const std::uint64_t* seeds,
                   const std::int32_t* coefficients, std::int64_t count) {
  alignas(64) float values[kValueRoom];
  std::memset(sums, 0, kTile * sizeof(double));
  const std::int64_t made = tile.first - aligned(tile.first) + tile.count;
  for (std::int64_t k = 0; k < count; ++k) {
    tile_values(seeds[k], stream, tile, values);
    const double c = coefficients[k];
    for (std::int64_t i = 0; i < made; ++i) sums[i] += c * values[i];
  }
}
#endif

template <typename Sum>
void apply(void* weight, Dtype dtype, const Tile& tile, Sum* sums, double factor) {
  alignas(64) float buffer[kTile];
  const Sum* held = tile_held(sums, tile);
  float* w = buffer;
  if (dtype == Dtype::float32) {
    w = static_cast<float*>(weight) + tile.local;
  } else {
    load(buffer, weight, dtype, tile.local, tile.held);
  }
  for (std::int64_t i = 0; i < tile.held; ++i) {
    w[i] = static_cast<float>(static_cast<double>(w[i]) + static_cast<double>(held[i]) * factor);
  }
  if (dtype != Dtype::float32) store(weight, buffer, dtype, tile.local, tile.held);
}

void replay(void* weight, Dtype dtype, const Tile& tile, const Stream& stream,
            const std::uint64_t* seeds, const std::int32_t* coefficients, std::int64_t count,
            double factor, bool wide) {
  if (stream.probe == Probe::gaussian) {
    alignas(64) double sums[kTile];
    gaussian_sums(sums, tile, stream, seeds, coefficients, count);
    apply(weight, dtype, tile, sums, factor);
  } else if (wide) {
    alignas(64) std::int64_t sums[kTile];
    wide_sums(sums, tile, stream, seeds, coefficients, count);
    apply(weight, dtype, tile, sums, factor);
  } else {
    alignas(64) std::int32_t sums[kSumRoom];
    narrow_sums(sums, tile, stream, seeds, Whole{coefficients}, count);
    apply(weight, dtype, tile, sums, factor);
  }
}

}  // namespace

extern const ReplayKernels kReplayKernels;
const ReplayKernels kReplayKernels = {replay};

}  // namespace FK_ISA
}  // namespace fedkernels
