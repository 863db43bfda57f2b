// weight + factor * sum_k c_k q_k with one rounding (../reference/replay.py). A tile of sums stays in
// the first-level cache while all seeds pass over it; weights are read and written once.
#include "signed_sums.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

// Seeds that may be added in 32 bits when coefficients are halves of 16 bits: 2048 * 16 * 65535 < 2^31.
constexpr std::int64_t kSegment = 2048;

// sums (natural order, from aligned(tile.first) on) = sum_k coefficients[k] q_k, in 32 bits.
template <typename Coefficient>
void narrow_sums(std::int32_t* sums, const Tile& tile, const Stream& stream,
                 const std::uint64_t* seeds, Coefficient coefficient, std::int64_t count) {
  alignas(64) std::int32_t mixed[kSumRoom];
  if (is_bits(stream)) {
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
    return;
  }
  alignas(64) std::uint32_t words[kValueRoom];
  std::memset(sums, 0, kTile * sizeof(std::int32_t));
  for (std::int64_t k = 0; k < count; ++k) {
    const std::int64_t made = tile_words(seeds[k], stream, tile, words);
    const std::int32_t c = coefficient(k);
    for (std::int64_t i = 0; i < made; ++i) sums[i] += c * centred_popcount(words[i]);
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
