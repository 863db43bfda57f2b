// The one matrix product of these kernels: fp32 blocks that fit the caches, any strides on the left.
// Include it only in files that are compiled once for each instruction set (isa.h).
#pragma once

#include "vectors.h"

namespace fedkernels::FK_ISA {

// The left matrix, element (i, k) at data[i * row + k * column]: a transposed one costs nothing,
// because its elements are broadcast one by one.
struct Left {
  const float* data;
  std::int64_t row, column;
};

// `Rows` x `Vectors` registers of the result, held while k runs.
template <int Rows, int Vectors, typename T>
static void tile(const Left& a, const float* b, std::int64_t ldb, T* c, std::int64_t ldc,
                 std::int64_t depth, bool accumulate) {
  Floats sums[Rows][Vectors];
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) {
      sums[i][v] = accumulate ? load(c + i * ldc + v * kLanes) : Floats{};
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Floats row[Vectors];
    for (int v = 0; v < Vectors; ++v) row[v] = load(b + k * ldb + v * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const Floats left = broadcast(a.data[i * a.row + k * a.column]);
      for (int v = 0; v < Vectors; ++v) sums[i][v] = multiply_add(left, row[v], sums[i][v]);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) store(c + i * ldc + v * kLanes, sums[i][v]);
  }
}

template <int Rows, int Vectors, typename T>
static void column_of_tiles(const Left& a, const float* b, std::int64_t ldb, T* c,
                            std::int64_t ldc, std::int64_t rows, std::int64_t depth,
                            bool accumulate) {
  std::int64_t i = 0;
  for (; i + Rows <= rows; i += Rows) {
    tile<Rows, Vectors>({a.data + i * a.row, a.row, a.column}, b, ldb, c + i * ldc, ldc, depth,
                        accumulate);
  }
  for (; i + 2 <= rows; i += 2) {
    tile<2, Vectors>({a.data + i * a.row, a.row, a.column}, b, ldb, c + i * ldc, ldc, depth,
                     accumulate);
  }
  for (; i < rows; ++i) {
    tile<1, Vectors>({a.data + i * a.row, a.row, a.column}, b, ldb, c + i * ldc, ldc, depth,
                     accumulate);
  }
}

// c[rows, columns] = (accumulate ? c : 0) + a[rows, depth] b[depth, columns].
// `columns` is a multiple of kLanes: callers pad with zeros. c may be bf16: rounded once, at the end.
template <typename T>
static void gemm(const Left& a, const float* b, std::int64_t ldb, T* c, std::int64_t ldc,
                 std::int64_t rows, std::int64_t columns, std::int64_t depth, bool accumulate) {
  std::int64_t j = 0;
#if defined(__AVX512F__)
  // 24 sums, the rest of the 32 registers for operands.
  for (; j + 4 * kLanes <= columns; j += 4 * kLanes) {
    column_of_tiles<6, 4>(a, b + j, ldb, c + j, ldc, rows, depth, accumulate);
  }
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
    column_of_tiles<8, 2>(a, b + j, ldb, c + j, ldc, rows, depth, accumulate);
  }
  for (; j < columns; j += kLanes) {
    column_of_tiles<16, 1>(a, b + j, ldb, c + j, ldc, rows, depth, accumulate);
  }
#else
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
    column_of_tiles<6, 2>(a, b + j, ldb, c + j, ldc, rows, depth, accumulate);
  }
  for (; j < columns; j += kLanes) {
    column_of_tiles<8, 1>(a, b + j, ldb, c + j, ldc, rows, depth, accumulate);
  }
#endif
}

static inline std::int64_t padded(std::int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

// to[0, padded(n)) = from[0, n) as fp32, then zeros.
template <typename T>
static void widen_row(float* to, const T* from, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load_some(from + i, n - i));
}

}  // namespace fedkernels::FK_ISA
