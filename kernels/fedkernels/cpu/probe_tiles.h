// One tile of a probe: its bits (rademacher, rank1), and what of a tile is here (all probes).
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

// The 32 bits from bit `place` on.
inline std::uint32_t bits_from(const std::uint32_t* words, std::int64_t place) {
  const std::uint64_t pair = words[place / 32] | std::uint64_t{words[place / 32 + 1]} << 32;
  return static_cast<std::uint32_t>(pair >> (place % 32));
}

// out: bits to .. to + count - 1 |= bits from .. from + count - 1 of `words`, exclusive or inversion.
inline void copy_bits(std::uint32_t* out, std::int64_t to, const std::uint32_t* words,
                      std::int64_t from, std::int64_t count, std::uint32_t inversion) {
  std::int64_t head = (32 - to % 32) % 32;
  if (head > count) head = count;
  if (head > 0) {
    const std::uint32_t bits = (bits_from(words, from) ^ inversion) & ((1u << head) - 1u);
    out[to / 32] |= bits << (to % 32);
  }
  to += head;
  from += head;
  count -= head;
  std::uint32_t* whole = out + to / 32;
  const std::uint32_t* source = words + from / 32;
  const std::int64_t wholes = count / 32;
  const int shift = static_cast<int>(from % 32);
  if (shift == 0) {
    for (std::int64_t w = 0; w < wholes; ++w) whole[w] = source[w] ^ inversion;
  } else {
    for (std::int64_t w = 0; w < wholes; ++w) {
      whole[w] = (source[w] >> shift | source[w + 1] << (32 - shift)) ^ inversion;
    }
  }
  if (count % 32 != 0) {
    const std::uint32_t bits = bits_from(words, from + 32 * wholes) ^ inversion;
    whole[wholes] |= bits & ((1u << (count % 32)) - 1u);
  }
}

// rank1: the sign of an element is the exclusive or of a row's bit and a column's, so a stretch of a
// row is a stretch of the columns' bits, inverted where the row's bit is set.
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
    if (column / kTile != window) {
      window = column / kTile;
      const std::int64_t left = stream.width - window * kTile;
      const std::int64_t blocks = ((left < kTile ? left : kTile) + kBlockBits - 1) / kBlockBits;
      philox_blocks(seed, stream.tensor_id,
                    kColumnStream + static_cast<std::uint64_t>(window * (kTile / kBlockBits)),
                    blocks, columns);
    }
    std::int64_t take = stream.width - column;
    if (take > kTile - column % kTile) take = kTile - column % kTile;
    if (take > count - done) take = count - done;
    const std::uint32_t bit = rows[row / 32 % 4] >> (row % 32) & 1u;
    copy_bits(out, done, columns, column % kTile, take, 0u - bit);
    done += take;
    column += take;
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
