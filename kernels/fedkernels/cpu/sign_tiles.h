// The loops around the lookups of a sign product, included by the files that define `Lookup` (below)
// and compiled once with each of them.
//
// The method of four Russians, with tables that fit a vector register: of every 4 numbers of a row of
// x, all signed sums (16, or 8 and their opposites) are tabled; the 4 bits of a column select one.
// So 4 products and sums cost one permutation and one sum, for as many columns as a vector has lanes,
// and a table serves all columns.
//
// Lookup has:  Entry, kTile (inputs of one pass, a multiple of 32, of which the tables fit the first
//              cache), kEntries (of the tables of one word, 32 inputs), kLanes, kSums (sums that fit
//              the registers), kVectors (at most so many vectors of columns at once);
//   float build<R>(const float* x, words, Entry* tables)   tables of one of R rows, and their unit
//   void accumulate<R, S>(tables, units, words, stride, count, sums)   for kLanes * S columns
#pragma once

#include <cstring>

#include "sign_adapter.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

float widened(std::uint16_t bits) {
  const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// To the nearest bfloat16, ties to even; a NaN keeps its sign and becomes quiet.
std::uint16_t narrowed(float value) {
  std::uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const std::uint32_t rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (word >> 16) | 0x40u;
  return static_cast<std::uint16_t>((word & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

void load_row(const SignProduct& p, std::int64_t row, std::int64_t first, std::int64_t count,
              std::int64_t padded, float* values) {
  const std::int64_t offset = row * p.inner + first;
  if (p.x_type == FloatType::float32) {
    std::memcpy(values, static_cast<const float*>(p.x) + offset,
                static_cast<std::size_t>(count) * sizeof(float));
  } else {
    const std::uint16_t* x = static_cast<const std::uint16_t*>(p.x) + offset;
    for (std::int64_t i = 0; i < count; ++i) values[i] = widened(x[i]);
  }
  for (std::int64_t i = count; i < padded; ++i) values[i] = 0.0f;
}

void store_row(const SignProduct& p, std::int64_t row, std::int64_t first, std::int64_t count,
               float* sums) {
  const std::int64_t offset = row * p.columns + first;
  if (p.scale != nullptr) {
    for (std::int64_t j = 0; j < count; ++j) sums[j] *= p.scale[first + j];
  }
  if (p.out_type == FloatType::float32) {
    const float* add = static_cast<const float*>(p.add);
    float* out = static_cast<float*>(p.out) + offset;
    if (add != nullptr) {
      for (std::int64_t j = 0; j < count; ++j) out[j] = sums[j] + add[offset + j];
    } else {
      std::memcpy(out, sums, static_cast<std::size_t>(count) * sizeof(float));
    }
    return;
  }
  const std::uint16_t* add = static_cast<const std::uint16_t*>(p.add);
  std::uint16_t* out = static_cast<std::uint16_t*>(p.out) + offset;
  if (add != nullptr) {
    for (std::int64_t j = 0; j < count; ++j) sums[j] += widened(add[offset + j]);
  }
  for (std::int64_t j = 0; j < count; ++j) out[j] = narrowed(sums[j]);
}

template <int R>
void product_rows(const SignProduct& p, std::int64_t row, std::int64_t column,
                  std::int64_t columns) {
  constexpr int kWide = Lookup::kSums / R < Lookup::kVectors ? Lookup::kSums / R : Lookup::kVectors;
  constexpr int kNarrow = 32 / Lookup::kLanes < kWide ? 32 / Lookup::kLanes : kWide;
  constexpr std::int64_t kTileWords = Lookup::kTile / 32;
  alignas(64) typename Lookup::Entry tables[R * kTileWords * Lookup::kEntries];
  alignas(64) float sums[R * kSignColumns];
  alignas(64) float values[Lookup::kTile];
  float units[R];
  std::memset(sums, 0, sizeof sums);
  for (std::int64_t first = 0; first < p.inner; first += Lookup::kTile) {
    const std::int64_t left = p.inner - first;
    const std::int64_t count = left < Lookup::kTile ? left : Lookup::kTile;
    const std::int64_t words = (count + 31) / 32;
    for (int r = 0; r < R; ++r) {
      load_row(p, row + r, first, count, 32 * words, values);
      units[r] = Lookup::template build<R>(values, words, tables, r);
    }
    const std::uint32_t* bits = p.words + first / 32 * p.stride + column;
    std::int64_t j = 0;
    for (; j + kWide * Lookup::kLanes <= columns; j += kWide * Lookup::kLanes) {
      Lookup::template accumulate<R, kWide>(tables, units, bits + j, p.stride, words, sums + j);
    }
    for (; j < columns; j += kNarrow * Lookup::kLanes) {
      Lookup::template accumulate<R, kNarrow>(tables, units, bits + j, p.stride, words, sums + j);
    }
  }
  for (int r = 0; r < R; ++r) store_row(p, row + r, column, columns, sums + r * kSignColumns);
}

void product(const SignProduct& p, const SignRange& range) {
  const std::int64_t column = range.column_begin;
  const std::int64_t columns = range.column_end - column;
  std::int64_t row = range.row_begin;
  for (; row + 8 <= range.row_end; row += 8) product_rows<8>(p, row, column, columns);
  for (; row + 4 <= range.row_end; row += 4) product_rows<4>(p, row, column, columns);
  for (; row + 2 <= range.row_end; row += 2) product_rows<2>(p, row, column, columns);
  for (; row < range.row_end; ++row) product_rows<1>(p, row, column, columns);
}

}  // namespace
}  // namespace FK_ISA
}  // namespace fedkernels
