// The q of one tile of a probe: as packed bits (rademacher, rank1) or as numbers (popcount, gaussian).
// Included by files that are compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox_blocks.h"
#include "probes.h"
#include "weights.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

// First elements of the streams of rank1's factors, in blocks.
constexpr std::uint64_t kRowStream = std::uint64_t{1} << 63;
constexpr std::uint64_t kColumnStream = kRowStream + (std::uint64_t{1} << 62);

constexpr std::int64_t kBlockBits = 128;
constexpr std::int64_t kTileWords = kTile / 32;
constexpr std::int64_t kWordRoom = kTileWords + kPadding + 4;  // room for one tile's bits
constexpr std::int64_t kValueRoom = kTile + kPadding + 4;      // room for one tile's numbers

inline bool is_bits(const Stream& stream) {
  return stream.probe == Probe::rademacher || stream.probe == Probe::rank1;
}

// The element with which the made part of a tile begins: that of a block of bits.
inline std::int64_t aligned(std::int64_t first) { return first / kBlockBits * kBlockBits; }

// rank1: the sign of an element is the exclusive or of a row's bit and a column's. Columns are copied
// up to 32 at a time, inverted where the row's bit is set.
inline void rank1_bits(std::uint64_t seed, const Stream& stream, std::int64_t first,
                       std::int64_t count, std::uint32_t* out) {
  std::uint32_t rows[4 + kPadding], columns[kWordRoom + 1];
  std::int64_t row_block = -1, window = -1;
  std::int64_t row = first / stream.width, column = first % stream.width, done = 0;
  std::memset(out, 0, (count + 31) / 32 * 4);
  while (done < count) {
    if (row / kBlockBits != row_block) {
      row_block = row / kBlockBits;
      philox_blocks(seed, stream.tensor_id, kRowStream + static_cast<std::uint64_t>(row_block), 1,
                    rows);
    }
    const std::uint32_t bit = rows[row / 32 % 4] >> (row % 32) & 1u;
    const std::uint32_t inversion = 0u - bit;
    for (; column < stream.width && done < count;) {
      if (column / kTile != window) {
        window = column / kTile;
        const std::int64_t left = stream.width - window * kTile;
        const std::int64_t blocks = ((left < kTile ? left : kTile) + kBlockBits - 1) / kBlockBits;
        philox_blocks(seed, stream.tensor_id,
                      kColumnStream + static_cast<std::uint64_t>(window * (kTile / kBlockBits)),
                      blocks, columns);
      }
      const std::int64_t place = column % kTile;
      std::int64_t take = 32 - done % 32;  // fill one word of the result
      if (take > stream.width - column) take = stream.width - column;
      if (take > kTile - place) take = kTile - place;
      if (take > count - done) take = count - done;
      const std::uint64_t pair =
          columns[place / 32] | std::uint64_t{columns[place / 32 + 1]} << 32;
      std::uint32_t bits = static_cast<std::uint32_t>(pair >> (place % 32)) ^ inversion;
      if (take < 32) bits &= (1u << take) - 1u;
      out[done / 32] |= bits << (done % 32);
      done += take;
      column += take;
    }
    if (column == stream.width) {
      column = 0;
      ++row;
    }
  }
}

// Writes the bits of elements aligned(tile.first) .. tile.first + tile.count - 1; a set bit is -1.
// Returns how many words those are.
inline std::int64_t tile_bits(std::uint64_t seed, const Stream& stream, const Tile& tile,
                              std::uint32_t* out) {
  const std::int64_t begin = aligned(tile.first);
  const std::int64_t blocks = (tile.first + tile.count - begin + kBlockBits - 1) / kBlockBits;
  if (stream.probe == Probe::rademacher) {
    philox_blocks(seed, stream.tensor_id, static_cast<std::uint64_t>(begin / kBlockBits), blocks,
                  out);
  } else {
    rank1_bits(seed, stream, begin, blocks * kBlockBits, out);
  }
  return blocks * 4;
}

// Writes the words of the elements from aligned(tile.first) on, one an element; returns how many.
inline std::int64_t tile_words(std::uint64_t seed, const Stream& stream, const Tile& tile,
                               std::uint32_t* out) {
  const std::int64_t begin = aligned(tile.first);
  const std::int64_t blocks = (tile.first + tile.count - begin + 3) / 4;
  philox_blocks(seed, stream.tensor_id, static_cast<std::uint64_t>(begin / 4), blocks, out);
  return blocks * 4;
}

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

// Writes q of popcount or gaussian for the elements from aligned(tile.first) on; `values` has
// kValueRoom elements.
inline void tile_values(std::uint64_t seed, const Stream& stream, const Tile& tile, float* values) {
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
}

// Keeps of `values`, which begins at aligned(tile.first), what the tile holds, from the front on.
template <typename T>
inline const T* tile_held(T* values, const Tile& tile) {
  const std::int64_t skip = tile.first - aligned(tile.first);
  if (tile.gather == nullptr) return values + skip;
  for (std::int64_t i = 0; i < tile.held; ++i) {
    values[i] = values[skip + tile.gather[i] - tile.origin];
  }
  return values;
}

}  // namespace
}  // namespace FK_ISA
}  // namespace fedkernels
