// Inner products of a change with many probes (../reference/replay.py).
//
// For probes of bits, 4 neighbouring elements have 16 signed sums: a table of them, made once a tile,
// serves all seeds, 16 of which stand side by side in the lanes of a vector. Sums of 128 elements are
// float32, everything above is float64, in an order that depends on nothing but the tile.
#include "probe_values.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

constexpr int kSeeds = 16;

// delta of the elements from aligned(tile.first) on, in float32, zero where nothing is held
void spread(float* out, const void* delta, Dtype dtype, const Tile& tile) {
  std::memset(out, 0, kTile * sizeof(float));
  float* at = out + (tile.first - aligned(tile.first));
  if (tile.gather == nullptr) {
    load(at, delta, dtype, tile.local, tile.held);
    return;
  }
  alignas(64) float held[kTile];
  load(held, delta, dtype, tile.local, tile.held);
  for (std::int64_t i = 0; i < tile.held; ++i) at[tile.gather[i] - tile.origin] = held[i];
}

// tables[t][n] = +-d[4t] +-d[4t+1] +-d[4t+2] +-d[4t+3], minus where the bit of n is set
void sign_tables(float (*tables)[16], const float* d, std::int64_t count) {
  for (std::int64_t t = 0; t < count; ++t, d += 4) {
    float front[4] = {d[0] + d[1], -d[0] + d[1], d[0] - d[1], -d[0] - d[1]};
    float back[4] = {d[2] + d[3], -d[2] + d[3], d[2] - d[3], -d[2] - d[3]};
    for (int n = 0; n < 16; ++n) tables[t][n] = front[n & 3] + back[n >> 2];
  }
}

// sums[s] += the sum of one block of 128 elements, for 16 seeds; words [4][16], tables [32]
inline void add_block(double* sums, const std::uint32_t* words, const float (*tables)[16]) {
#if defined(__AVX512F__)
  __m512 part[4];
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    __m512i index = _mm512_load_si512(words + kSeeds * w);
    part[w] = _mm512_permutexvar_ps(index, _mm512_load_ps(tables[8 * w]));
#pragma GCC unroll 7
    for (int j = 1; j < 8; ++j) {
      index = _mm512_srli_epi32(index, 4);
      part[w] = _mm512_add_ps(part[w],
                              _mm512_permutexvar_ps(index, _mm512_load_ps(tables[8 * w + j])));
    }
  }
  const __m512 sum = _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(sum));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
#elif defined(__AVX2__)
  for (int half = 0; half < kSeeds; half += 8) {
    __m256 part[4];
    for (int w = 0; w < 4; ++w) {
      __m256i index =
          _mm256_load_si256(reinterpret_cast<const __m256i*>(words + kSeeds * w + half));
      part[w] = _mm256_setzero_ps();
      for (int j = 0; j < 8; ++j) {
        // a permutation reads 3 bits; the fourth, moved to the sign, chooses between two of them
        const __m256 clear = _mm256_permutevar8x32_ps(_mm256_load_ps(tables[8 * w + j]), index);
        const __m256 set = _mm256_permutevar8x32_ps(_mm256_load_ps(tables[8 * w + j] + 8), index);
        const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        part[w] = _mm256_add_ps(part[w], _mm256_blendv_ps(clear, set, choice));
        index = _mm256_srli_epi32(index, 4);
      }
    }
    const __m256 sum =
        _mm256_add_ps(_mm256_add_ps(part[0], part[1]), _mm256_add_ps(part[2], part[3]));
    double* at = sums + half;
    _mm256_storeu_pd(at, _mm256_add_pd(_mm256_loadu_pd(at),
                                       _mm256_cvtps_pd(_mm256_castps256_ps128(sum))));
    _mm256_storeu_pd(at + 4, _mm256_add_pd(_mm256_loadu_pd(at + 4),
                                           _mm256_cvtps_pd(_mm256_extractf128_ps(sum, 1))));
  }
#else
  for (int s = 0; s < kSeeds; ++s) {
    float part[4];
    for (int w = 0; w < 4; ++w) {
      const std::uint32_t word = words[kSeeds * w + s];
      part[w] = tables[8 * w][word & 15u];
      for (int j = 1; j < 8; ++j) part[w] += tables[8 * w + j][word >> (4 * j) & 15u];
    }
    sums[s] += (part[0] + part[1]) + (part[2] + part[3]);
  }
#endif
}

void project_bits(double* sums, const float* delta, const Tile& tile, const Stream& stream,
                  const std::uint64_t* seeds, std::int64_t count) {
  alignas(64) float tables[kTile / 4][16];
  alignas(64) std::uint32_t lanes[kTileWords][kSeeds];
  std::uint32_t words[kWordRoom];
  const std::int64_t blocks =
      (tile.first - aligned(tile.first) + tile.count + kBlockBits - 1) / kBlockBits;
  sign_tables(tables, delta, blocks * 32);
  std::memset(lanes, 0, sizeof lanes);
  for (std::int64_t k = 0; k < count; k += kSeeds) {
    const int taken = static_cast<int>(count - k < kSeeds ? count - k : kSeeds);
    for (int s = 0; s < taken; ++s) {
      const std::int64_t made = tile_bits(seeds[k + s], stream, tile, words);
      for (std::int64_t w = 0; w < made; ++w) lanes[w][s] = words[w];
    }
    double of_tile[kSeeds] = {};
    for (std::int64_t b = 0; b < blocks; ++b) add_block(of_tile, lanes[4 * b], tables + 32 * b);
    for (int s = 0; s < taken; ++s) sums[k + s] += of_tile[s];
  }
}

constexpr std::int64_t kSpan = 256;  // elements of a sum in float32, at most 32 of them a lane

#if defined(FK_VECTORS)
void project_values(double* sums, const float* delta, const Tile& tile, const Stream& stream,
                    const std::uint64_t* seeds, std::int64_t count) {
  const std::int64_t begin = aligned(tile.first), made = tile.first + tile.count - begin;
  alignas(64) float mixed[kTile];  // delta in the order in which q arise
  std::uint32_t places[kSetElements];
  set_places(places);
  for (std::int64_t i = 0; i < kTile; ++i) {
    mixed[i / kSetElements * kSetElements + places[i % kSetElements]] = delta[i];
  }
  for (std::int64_t k = 0; k < count; ++k) {
    Schedule schedule;
    schedule_keys(seeds[k], &schedule);
    alignas(64) double lanes[kVector] = {};
    for (std::int64_t from = 0; from < made; from += kSpan) {
      Floats even = all_floats(0.0f), odd = even;
      for (std::int64_t i = from; i < from + kSpan && i < made; i += kGroupElements) {
        const std::uint64_t block = static_cast<std::uint64_t>((begin + i) / 4);
        FloatSet q[kSets];
        if (stream.probe == Probe::popcount) {
          popcount_group(schedule, stream.tensor_id, block, q);
        } else {
          gaussian_group(schedule, stream.tensor_id, block, q);
        }
        for (int s = 0; s < kSets; ++s) {
          const float* d = mixed + i + s * kSetElements;
          even = multiply_add(q[s].even, load_floats(d), even);
          odd = multiply_add(q[s].odd, load_floats(d + kVector), odd);
        }
      }
      add_products(lanes, 1.0, even);
      add_products(lanes, 1.0, odd);
    }
    for (const double lane : lanes) sums[k] += lane;
  }
}
#else
void project_values(double* sums, const float* delta, const Tile& tile, const Stream& stream,
                    const std::uint64_t* seeds, std::int64_t count) {
  alignas(64) float values[kValueRoom];
  std::memset(values, 0, sizeof values);
  const std::int64_t made = tile.first - aligned(tile.first) + tile.count;
  for (std::int64_t k = 0; k < count; ++k) {
    tile_values(seeds[k], stream, tile, values);
    double total = 0.0;
    for (std::int64_t begin = 0; begin < made; begin += kSpan) {
      float part[16] = {};
      for (std::int64_t i = begin; i < begin + kSpan; i += 16) {
        for (int lane = 0; lane < 16; ++lane) part[lane] += values[i + lane] * delta[i + lane];
      }
      for (int lane = 0; lane < 16; ++lane) total += part[lane];
    }
    sums[k] += total;
  }
}
#endif

void project(double* sums, const void* delta, Dtype dtype, const Tile& tile, const Stream& stream,
             const std::uint64_t* seeds, std::int64_t count) {
  alignas(64) float spread_out[kTile];
  spread(spread_out, delta, dtype, tile);
  if (is_bits(stream)) {
    project_bits(sums, spread_out, tile, stream, seeds, count);
  } else {
    project_values(sums, spread_out, tile, stream, seeds, count);
  }
}

}  // namespace

extern const ProjectKernels kProjectKernels;
const ProjectKernels kProjectKernels = {project};

}  // namespace FK_ISA
}  // namespace fedkernels
