// Products with the thin factors of a low-rank adapter. x and y stay in their storage type in memory;
// blocks of them are widened to fp32 in a scratch that fits the caches.
#include "small_gemm.h"

namespace fedkernels::FK_ISA {
namespace {

constexpr std::int64_t kBlockRows = 48;     // of x or y in fp32; a multiple of the tiles' rows
constexpr std::int64_t kBlockColumns = 512; // 48 x 512 floats are 96 KiB
std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

std::int64_t scratch_size(std::int64_t rank, std::int64_t n) {
  // A block; the whole factor, padded either way; a block of results.
  return kBlockRows * kBlockColumns + (rank + kLanes) * (n + kLanes) +
         (kBlockRows + rank) * (kBlockColumns + padded(rank));
}

template <typename T>
void widen_block(float* to, std::int64_t stride, const T* from, std::int64_t n, std::int64_t rows,
                 std::int64_t columns) {
  for (std::int64_t row = 0; row < rows; ++row) {
    widen_row(to + row * stride, from + row * n, columns);
  }
}

template <typename T>
void project(float* h, const T* x, const float* across, std::int64_t rows, std::int64_t rank,
             std::int64_t n, float* scratch) {
  const std::int64_t wide = padded(rank);
  float* block = scratch;
  float* results = block + kBlockRows * kBlockColumns;
  float* right = results + kBlockRows * wide;  // [n, wide]
  for (std::int64_t k = 0; k < n; ++k) widen_row(right + k * wide, across + k * rank, rank);
  for (std::int64_t row = 0; row < rows; row += kBlockRows) {
    const std::int64_t height = smaller(kBlockRows, rows - row);
    for (std::int64_t k = 0; k < n; k += kBlockColumns) {
      const std::int64_t depth = smaller(kBlockColumns, n - k);
      widen_block(block, kBlockColumns, x + row * n + k, n, height, depth);
      gemm({block, kBlockColumns, 1}, right + k * wide, wide, results, wide, height, wide,
           depth, k > 0);
    }
    for (std::int64_t i = 0; i < height; ++i) {
      std::memcpy(h + (row + i) * rank, results + i * wide,
                  static_cast<std::size_t>(rank) * sizeof(float));
    }
  }
}

template <typename T>
void expand(T* y, const float* h, std::int64_t h_stride, const float* factor, std::int64_t rows,
            std::int64_t rank, std::int64_t n, float* scratch) {
  const std::int64_t whole = n - n % kLanes;
  for (std::int64_t row = 0; row < rows; row += kBlockRows) {
    const std::int64_t height = smaller(kBlockRows, rows - row);
    gemm({h + row * h_stride, h_stride, 1}, factor, n, y + row * n, n, height, whole, rank, true);
  }
  if (whole == n) return;
  float* rest = scratch;  // what is left of each row, and of the factor, as one vector
  float* right = rest + kBlockRows * kLanes;
  for (std::int64_t r = 0; r < rank; ++r) {
    widen_row(right + r * kLanes, factor + r * n + whole, n - whole);
  }
  for (std::int64_t row = 0; row < rows; row += kBlockRows) {
    const std::int64_t height = smaller(kBlockRows, rows - row);
    widen_block(rest, kLanes, y + row * n + whole, n, height, n - whole);
    gemm({h + row * h_stride, h_stride, 1}, right, kLanes, rest, kLanes, height, kLanes, rank, true);
    for (std::int64_t i = 0; i < height; ++i) {
      store_some(y + (row + i) * n + whole, load(rest + i * kLanes), n - whole);
    }
  }
}

template <typename T>
void outer(float* out, const float* h, std::int64_t h_stride, const T* x, std::int64_t rows,
           std::int64_t rank, std::int64_t n, std::int64_t first, std::int64_t past,
           float* scratch) {
  float* block = scratch;
  float* results = block + kBlockRows * kBlockColumns;
  for (std::int64_t j = first; j < past; j += kBlockColumns) {
    const std::int64_t width = smaller(kBlockColumns, past - j);
    const std::int64_t wide = padded(width);
    for (std::int64_t row = 0; row < rows; row += kBlockRows) {
      const std::int64_t height = smaller(kBlockRows, rows - row);
      widen_block(block, wide, x + row * n + j, n, height, width);
      gemm({h + row * h_stride, 1, h_stride}, block, wide, results, wide, rank, wide, height,
           row > 0);
    }
    for (std::int64_t r = 0; r < rank; ++r) {
      std::memcpy(out + r * n + j, results + r * wide,
                  static_cast<std::size_t>(width) * sizeof(float));
    }
  }
}

template <typename T>
constexpr LowRankKernels<T> table = {scratch_size, project<T>, expand<T>, outer<T>};

}  // namespace

extern const LowRankKernels<float> kLowRankKernelsF32;
extern const LowRankKernels<Bf16> kLowRankKernelsBf16;
const LowRankKernels<float> kLowRankKernelsF32 = table<float>;
const LowRankKernels<Bf16> kLowRankKernelsBf16 = table<Bf16>;

}  // namespace fedkernels::FK_ISA
