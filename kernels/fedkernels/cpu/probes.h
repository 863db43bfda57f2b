// What the kernels of probes work on: one tile of a tensor at a time (see ../reference/probes.py).
#pragma once

#include <cstdint>

namespace fedkernels {

enum class Probe : int { rademacher = 0, popcount = 1, gaussian = 2, rank1 = 3 };
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Elements of a tile: a tile never crosses a multiple of this in the whole tensor, so that its bits
// are at most 16 blocks of the generator, and its sums stay in the first-level cache.
constexpr std::int64_t kTile = 2048;

// Consecutive elements of the whole tensor, and which of them are here.
struct Tile {
  std::int64_t local;          // index here of the first element that is here
  std::int64_t first;          // index in the whole of the tile's first element
  std::int64_t count;          // elements of the whole that the tile spans
  std::int64_t held;           // elements here; `count` where `gather` is null
  const std::int64_t* gather;  // places of those elements, strictly increasing, as ...
  std::int64_t origin;         // ... gather[i] - origin, in [0, count)
};

// The probe of one tensor; `width` is its number of columns, of which only rank1 asks.
struct Stream {
  Probe probe;
  std::uint64_t tensor_id;
  std::int64_t width;
};

struct PerturbKernels {
  // out = fma(q, step, weight); weight may be null (zero), and may be out.
  void (*perturb)(void* out, const void* weight, Dtype dtype, const Tile& tile, const Stream& stream,
                  std::uint64_t seed, float step);
};

struct ReplayKernels {
  // weight += factor * sum_k coefficients[k] q_k, rounded once. `wide`: the sum of the magnitudes may
  // not fit 32 bits.
  void (*replay)(void* weight, Dtype dtype, const Tile& tile, const Stream& stream,
                 const std::uint64_t* seeds, const std::int32_t* coefficients, std::int64_t count,
                 double factor, bool wide);
};

struct ProjectKernels {
  // sums[k] += <delta, q_k> over the tile.
  void (*project)(double* sums, const void* delta, Dtype dtype, const Tile& tile,
                  const Stream& stream, const std::uint64_t* seeds, std::int64_t count);
};

}  // namespace fedkernels
