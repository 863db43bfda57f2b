// The kernels of the local training step: tables of function pointers, one row an instruction set.
// Matrices are row-major and contiguous; sums are in fp32 whatever the storage type.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fedkernels {

struct Bf16 {
  std::uint16_t bits;
};

// Work on whole rows or on flat ranges: memory-bound, one pass.
template <typename T>
struct RowKernels {
  // y = round(x * rstd) * weight, rstd = 1 / sqrt(mean(x^2) + epsilon); x, y [rows, n], rstd [rows].
  void (*rms_norm)(T* y, float* rstd, const T* x, const T* weight, std::int64_t rows,
                   std::int64_t n, float epsilon);
  void (*rms_norm_backward)(T* dx, const T* dy, const T* x, const T* weight, const float* rstd,
                            std::int64_t rows, std::int64_t n);
  // y = silu(gate) * up.
  void (*swiglu)(T* y, const T* gate, const T* up, std::int64_t count);
  void (*swiglu_backward)(T* dgate, T* dup, const T* dy, const T* gate, const T* up,
                          std::int64_t count);
  // loss[i] = logsumexp(logits[i]) - logits[i, label]; best[i] = the first largest logit's index.
  // With `gradient` the logits become softmax(logits) - onehot(label).
  void (*cross_entropy)(T* logits, float* loss, std::int64_t* best, const std::int64_t* labels,
                        std::int64_t rows, std::int64_t n, bool gradient);
};

// Products with a matrix of few rows, the factor of a low-rank adapter; fp32 but for x and y.
// `scratch` holds scratch_size(...) floats.
template <typename T>
struct LowRankKernels {
  std::int64_t (*scratch_size)(std::int64_t rank, std::int64_t n);
  // h[rows, rank] = x[rows, n] across[n, rank]
  void (*project)(float* h, const T* x, const float* across, std::int64_t rows, std::int64_t rank,
                  std::int64_t n, float* scratch);
  // y[rows, n] += h[rows, rank] factor[rank, n], h with a row stride
  void (*expand)(T* y, const float* h, std::int64_t h_stride, const float* factor,
                 std::int64_t rows, std::int64_t rank, std::int64_t n, float* scratch);
  // out[rank, first..past) = h[rows, rank]^T x[rows, first..past), h with a row stride
  void (*outer)(float* out, const float* h, std::int64_t h_stride, const T* x, std::int64_t rows,
                std::int64_t rank, std::int64_t n, std::int64_t first, std::int64_t past,
                float* scratch);
};

// Causal attention over grouped heads with rotary positions applied on the way in.
template <typename T>
struct AttentionProblem {
  const T *q, *k, *v;        // q [batch, length, heads, width]; k, v [batch, length, groups, width]
  const T *cosine, *sine;    // [batch or 1, length, width]; both null: no rotation
  std::int64_t table_stride; // elements from one batch to the next in the tables: 0 if shared
  const std::uint8_t* mask;  // [batch or 1, length, length], nonzero: may look; null: causal
  std::int64_t mask_stride;  // bytes from one batch to the next: 0 if shared
  std::int64_t length, heads, groups, width;
  float scale;
};

template <typename T>
struct AttentionKernels {
  std::int64_t (*scratch_size)(std::int64_t length, std::int64_t width);
  // One batch and group of heads. out as q, log_sums [batch, heads, length].
  void (*forward)(const AttentionProblem<T>& problem, T* out, float* log_sums, std::int64_t batch,
                  std::int64_t group, float* scratch);
  // Writes the group's part of dq, dk, dv from dout, out and log_sums.
  void (*backward)(const AttentionProblem<T>& problem, const T* dout, const T* out,
                   const float* log_sums, T* dq, T* dk, T* dv, std::int64_t batch,
                   std::int64_t group, float* scratch);
};

#define FK_DECLARE_TRAINING(isa)                            \
  namespace isa {                                           \
  extern const RowKernels<float> kRowKernelsF32;            \
  extern const RowKernels<Bf16> kRowKernelsBf16;            \
  extern const LowRankKernels<float> kLowRankKernelsF32;    \
  extern const LowRankKernels<Bf16> kLowRankKernelsBf16;    \
  extern const AttentionKernels<float> kAttentionKernelsF32;  \
  extern const AttentionKernels<Bf16> kAttentionKernelsBf16;  \
  }

FK_DECLARE_TRAINING(portable)
#if defined(FK_HAS_X86)
FK_DECLARE_TRAINING(avx2)
FK_DECLARE_TRAINING(avx512)
#elif defined(FK_HAS_NEON)
FK_DECLARE_TRAINING(neon)
#endif

#undef FK_DECLARE_TRAINING

}  // namespace fedkernels
