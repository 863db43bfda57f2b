// Checks shapes and types of what Python hands over, shares the rows out to threads, and calls the
// kernels of the instruction set asked for.
#include <nanobind/stl/optional.h>

#include <atomic>
#include <memory>
#include <new>

#include "arrays.h"
#include "bindings.h"
#include "threads.h"
#include "training.h"

namespace fedkernels {
namespace {

using Array = nb::ndarray<>;
using Size = std::int64_t;

constexpr Size kGrainElements = 1 << 14;  // less work than this is not worth waking a thread for

#if defined(FK_HAS_X86)
#define FK_CHOOSE(table, isa)                       \
  ((isa) == Isa::avx512 ? avx512::table : (isa) == Isa::avx2 ? avx2::table : portable::table)
#elif defined(FK_HAS_NEON)
#define FK_CHOOSE(table, isa) ((isa) == Isa::neon ? neon::table : portable::table)
#else
#define FK_CHOOSE(table, isa) ((void)(isa), portable::table)
#endif

template <typename T>
struct Kernels;

template <>
struct Kernels<float> {
  static RowKernels<float> rows(Isa isa) { return FK_CHOOSE(kRowKernelsF32, isa); }
  static LowRankKernels<float> low_rank(Isa isa) { return FK_CHOOSE(kLowRankKernelsF32, isa); }
  static AttentionKernels<float> attention(Isa isa) { return FK_CHOOSE(kAttentionKernelsF32, isa); }
};

template <>
struct Kernels<Bf16> {
  static RowKernels<Bf16> rows(Isa isa) { return FK_CHOOSE(kRowKernelsBf16, isa); }
  static LowRankKernels<Bf16> low_rank(Isa isa) { return FK_CHOOSE(kLowRankKernelsBf16, isa); }
  static AttentionKernels<Bf16> attention(Isa isa) { return FK_CHOOSE(kAttentionKernelsBf16, isa); }
};

bool is_bfloat16(const Array& array) {
  const auto type = array.dtype();
  return type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat) &&
         type.bits == 16 && type.lanes == 1;
}

template <typename T>
T* values(const Array& array, const char* name) {
  return elements<T>(array, name, "float32");
}

template <>
Bf16* values<Bf16>(const Array& array, const char* name) {
  if (!is_bfloat16(array)) refuse(name, "must be bfloat16, as the other tensors are");
  check_contiguous_cpu(array, name);
  return static_cast<Bf16*>(array.data());
}

// Calls work(T{}) for the storage type of `array`.
template <typename Work>
void with_type(const Array& array, const char* name, const Work& work) {
  if (is_bfloat16(array)) {
    work(Bf16{});
  } else if (array.dtype() == nb::dtype<float>()) {
    work(float{});
  } else {
    refuse(name, "must be float32 or bfloat16");
  }
}

void check_shape(const Array& array, const char* name, std::initializer_list<Size> shape) {
  bool same = array.ndim() == shape.size();
  std::size_t i = 0;
  for (const Size size : shape) same = same && static_cast<Size>(array.shape(i++)) == size;
  if (!same) refuse(name, "does not have the shape that the other tensors ask for");
}

void check_like(const Array& array, const char* name, const Array& other) {
  bool same = array.ndim() == other.ndim();
  for (std::size_t i = 0; same && i < array.ndim(); ++i) same = array.shape(i) == other.shape(i);
  if (!same) refuse(name, "does not have the shape that the other tensors ask for");
}

void check_matrix(const Array& array, const char* name) {
  if (array.ndim() != 2) refuse(name, "must have two dimensions");
}

Size size(const Array& array, std::size_t i) { return static_cast<Size>(array.shape(i)); }

// parallel_for whose body gets `count` floats of scratch; MemoryError where there is none.
template <typename Body>
void parallel_with_scratch(Size rows, Size grain, int threads, Size count, const Body& body) {
  std::atomic<bool> failed{false};
  parallel_for(rows, grain, threads, [&](Size first, Size past) {
    constexpr auto alignment = std::align_val_t{64};
    void* memory = ::operator new(static_cast<std::size_t>(count) * sizeof(float), alignment,
                                  std::nothrow);
    if (memory == nullptr) {
      failed.store(true);
      return;
    }
    body(first, past, static_cast<float*>(memory));
    ::operator delete(memory, alignment);
  });
  if (failed.load()) throw std::bad_alloc();
}

Size grain_rows(Size n) { return n >= kGrainElements ? 1 : (kGrainElements + n - 1) / (n > 0 ? n : 1); }

void rms_norm(const Array& y, const Array& rstd, const Array& x, const Array& weight, float epsilon,
              int isa, int threads) {
  check_matrix(x, "x");
  const Size rows = size(x, 0), n = size(x, 1);
  check_like(y, "y", x);
  check_shape(rstd, "rstd", {rows});
  check_shape(weight, "weight", {n});
  with_type(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernels = Kernels<T>::rows(checked_isa(isa));
    T* to = values<T>(y, "y");
    float* scales = values<float>(rstd, "rstd");
    const T *from = values<T>(x, "x"), *factors = values<T>(weight, "weight");
    const nb::gil_scoped_release unlocked;
    parallel_for(rows, grain_rows(n), threads, [&](Size first, Size past) {
      kernels.rms_norm(to + first * n, scales + first, from + first * n, factors, past - first, n,
                       epsilon);
    });
  });
}

void rms_norm_backward(const Array& dx, const Array& dy, const Array& x, const Array& weight,
                       const Array& rstd, int isa, int threads) {
  check_matrix(x, "x");
  const Size rows = size(x, 0), n = size(x, 1);
  check_like(dx, "dx", x);
  check_like(dy, "dy", x);
  check_shape(rstd, "rstd", {rows});
  check_shape(weight, "weight", {n});
  with_type(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernels = Kernels<T>::rows(checked_isa(isa));
    T* to = values<T>(dx, "dx");
    const T *gradient = values<T>(dy, "dy"), *from = values<T>(x, "x");
    const T* factors = values<T>(weight, "weight");
    const float* scales = values<float>(rstd, "rstd");
    const nb::gil_scoped_release unlocked;
    parallel_for(rows, grain_rows(n), threads, [&](Size first, Size past) {
      kernels.rms_norm_backward(to + first * n, gradient + first * n, from + first * n, factors,
                                scales + first, past - first, n);
    });
  });
}

void swiglu(const Array& y, const Array& gate, const Array& up, int isa, int threads) {
  check_like(y, "y", gate);
  check_like(up, "up", gate);
  with_type(gate, "gate", [&](auto type) {
    using T = decltype(type);
    const auto kernels = Kernels<T>::rows(checked_isa(isa));
    T* to = values<T>(y, "y");
    const T *gates = values<T>(gate, "gate"), *ups = values<T>(up, "up");
    const Size count = static_cast<Size>(gate.size());
    const nb::gil_scoped_release unlocked;
    parallel_for(count, kGrainElements, threads, [&](Size first, Size past) {
      kernels.swiglu(to + first, gates + first, ups + first, past - first);
    });
  });
}

void swiglu_backward(const Array& dgate, const Array& dup, const Array& dy, const Array& gate,
                     const Array& up, int isa, int threads) {
  check_like(dgate, "dgate", gate);
  check_like(dup, "dup", gate);
  check_like(dy, "dy", gate);
  check_like(up, "up", gate);
  with_type(gate, "gate", [&](auto type) {
    using T = decltype(type);
    const auto kernels = Kernels<T>::rows(checked_isa(isa));
    T *to_gate = values<T>(dgate, "dgate"), *to_up = values<T>(dup, "dup");
    const T *gradient = values<T>(dy, "dy"), *gates = values<T>(gate, "gate");
    const T* ups = values<T>(up, "up");
    const Size count = static_cast<Size>(gate.size());
    const nb::gil_scoped_release unlocked;
    parallel_for(count, kGrainElements, threads, [&](Size first, Size past) {
      kernels.swiglu_backward(to_gate + first, to_up + first, gradient + first, gates + first,
                              ups + first, past - first);
    });
  });
}

void cross_entropy_(const Array& logits, const Array& loss, const Array& best, const Array& labels,
                    bool gradient, int isa, int threads) {
  check_matrix(logits, "logits");
  const Size rows = size(logits, 0), n = size(logits, 1);
  check_shape(loss, "loss", {rows});
  check_shape(best, "best", {rows});
  check_shape(labels, "labels", {rows});
  with_type(logits, "logits", [&](auto type) {
    using T = decltype(type);
    const auto kernels = Kernels<T>::rows(checked_isa(isa));
    T* scores = values<T>(logits, "logits");
    float* losses = values<float>(loss, "loss");
    Size* found = elements<Size>(best, "best", "int64");
    const Size* wanted = elements<Size>(labels, "labels", "int64");
    for (Size row = 0; row < rows; ++row) {
      if (wanted[row] < 0 || wanted[row] >= n) refuse("labels", "must be indices of the vocabulary");
    }
    const nb::gil_scoped_release unlocked;
    parallel_for(rows, grain_rows(n), threads, [&](Size first, Size past) {
      kernels.cross_entropy(scores + first * n, losses + first, found + first, wanted + first,
                            past - first, n, gradient);
    });
  });
}

void low_rank_project(const Array& h, const Array& x, const Array& across, int isa, int threads) {
  check_matrix(x, "x");
  check_matrix(across, "across");
  const Size rows = size(x, 0), n = size(x, 1), rank = size(across, 1);
  check_shape(across, "across", {n, rank});
  check_shape(h, "h", {rows, rank});
  with_type(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernels = Kernels<T>::low_rank(checked_isa(isa));
    float* to = values<float>(h, "h");
    const T* from = values<T>(x, "x");
    const float* transposed = values<float>(across, "across");
    const nb::gil_scoped_release unlocked;
    parallel_with_scratch(rows, 192, threads, kernels.scratch_size(rank, n),
                          [&](Size first, Size past, float* scratch) {
      kernels.project(to + first * rank, from + first * n, transposed, past - first, rank, n, scratch);
    });
  });
}

// `first_column` of h is where the factor's part of it begins.
void low_rank_expand_(const Array& y, const Array& h, Size first_column, const Array& factor,
                      int isa, int threads) {
  check_matrix(y, "y");
  check_matrix(h, "h");
  check_matrix(factor, "factor");
  const Size rows = size(y, 0), n = size(y, 1), rank = size(factor, 0), stride = size(h, 1);
  check_shape(factor, "factor", {rank, n});
  check_shape(h, "h", {rows, stride});
  if (first_column < 0 || first_column + rank > stride) {
    refuse("first_column", "and the factor's rank reach beyond h");
  }
  with_type(y, "y", [&](auto type) {
    using T = decltype(type);
    const auto kernels = Kernels<T>::low_rank(checked_isa(isa));
    T* to = values<T>(y, "y");
    const float *from = values<float>(h, "h") + first_column;
    const float* factors = values<float>(factor, "factor");
    const nb::gil_scoped_release unlocked;
    parallel_with_scratch(rows, 96, threads, kernels.scratch_size(rank, n),
                          [&](Size first, Size past, float* scratch) {
      kernels.expand(to + first * n, from + first * stride, stride, factors, past - first, rank, n,
                     scratch);
    });
  });
}

void low_rank_outer(const Array& out, const Array& h, Size first_column, const Array& x, int isa,
                    int threads) {
  check_matrix(out, "out");
  check_matrix(h, "h");
  check_matrix(x, "x");
  const Size rows = size(x, 0), n = size(x, 1), rank = size(out, 0), stride = size(h, 1);
  check_shape(out, "out", {rank, n});
  check_shape(h, "h", {rows, stride});
  if (first_column < 0 || first_column + rank > stride) {
    refuse("first_column", "and the result's rank reach beyond h");
  }
  with_type(x, "x", [&](auto type) {
    using T = decltype(type);
    const auto kernels = Kernels<T>::low_rank(checked_isa(isa));
    float* to = values<float>(out, "out");
    const float* from = values<float>(h, "h") + first_column;
    const T* right = values<T>(x, "x");
    const nb::gil_scoped_release unlocked;
    if (rows == 0) {
      for (Size i = 0; i < rank * n; ++i) to[i] = 0.0f;
      return;
    }
    parallel_with_scratch(n, 64, threads, kernels.scratch_size(rank, n),
                          [&](Size first, Size past, float* scratch) {
      kernels.outer(to, from, stride, right, rows, rank, n, first, past, scratch);
    });
  });
}

template <typename T>
AttentionProblem<T> attention_problem(const Array& q, const Array& k, const Array& v,
                                      const std::optional<Array>& cosine,
                                      const std::optional<Array>& sine,
                                      const std::optional<Array>& mask, float scale) {
  if (q.ndim() != 4) refuse("q", "must have four dimensions");
  if (k.ndim() != 4) refuse("k", "must have four dimensions");
  const Size batch = size(q, 0), length = size(q, 1), heads = size(q, 2), width = size(q, 3);
  const Size groups = size(k, 2);
  check_shape(k, "k", {batch, length, groups, width});
  check_like(v, "v", k);
  if (groups == 0 || heads % groups != 0) refuse("k", "must have a divisor of the query heads");
  AttentionProblem<T> problem{};
  problem.q = values<T>(q, "q");
  problem.k = values<T>(k, "k");
  problem.v = values<T>(v, "v");
  if (cosine.has_value() != sine.has_value()) refuse("cosine", "and sine come together");
  if (cosine) {
    if (width % 2 != 0) refuse("q", "must have an even width to be rotated");
    const Size tables = cosine->ndim() == 3 ? size(*cosine, 0) : 0;
    if (tables != 1 && tables != batch) refuse("cosine", "must have one row, or one a batch");
    check_shape(*cosine, "cosine", {tables, length, width});
    check_like(*sine, "sine", *cosine);
    problem.cosine = values<T>(*cosine, "cosine");
    problem.sine = values<T>(*sine, "sine");
    problem.table_stride = tables == 1 ? 0 : length * width;
  }
  if (mask) {
    const Size masks = mask->ndim() == 3 ? size(*mask, 0) : 0;
    if (masks != 1 && masks != batch) refuse("mask", "must have one row, or one a batch");
    check_shape(*mask, "mask", {masks, length, length});
    problem.mask = elements<std::uint8_t>(*mask, "mask", "uint8");
    problem.mask_stride = masks == 1 ? 0 : length * length;
  }
  problem.length = length;
  problem.heads = heads;
  problem.groups = groups;
  problem.width = width;
  problem.scale = scale;
  return problem;
}

void attention(const Array& out, const Array& log_sums, const Array& q, const Array& k,
               const Array& v, const std::optional<Array>& cosine,
               const std::optional<Array>& sine, const std::optional<Array>& mask, float scale,
               int isa, int threads) {
  with_type(q, "q", [&](auto type) {
    using T = decltype(type);
    const auto kernels = Kernels<T>::attention(checked_isa(isa));
    const auto problem = attention_problem<T>(q, k, v, cosine, sine, mask, scale);
    check_like(out, "out", q);
    check_shape(log_sums, "log_sums", {size(q, 0), problem.heads, problem.length});
    T* to = values<T>(out, "out");
    float* logs = values<float>(log_sums, "log_sums");
    const Size parts = size(q, 0) * problem.groups;
    const nb::gil_scoped_release unlocked;
    parallel_with_scratch(parts, 1, threads, kernels.scratch_size(problem.length, problem.width),
                          [&](Size first, Size past, float* scratch) {
      for (Size part = first; part < past; ++part) {
        kernels.forward(problem, to, logs, part / problem.groups, part % problem.groups, scratch);
      }
    });
  });
}

void attention_backward(const Array& dq, const Array& dk, const Array& dv, const Array& dout,
                        const Array& out, const Array& log_sums, const Array& q, const Array& k,
                        const Array& v, const std::optional<Array>& cosine,
                        const std::optional<Array>& sine, const std::optional<Array>& mask,
                        float scale, int isa, int threads) {
  with_type(q, "q", [&](auto type) {
    using T = decltype(type);
    const auto kernels = Kernels<T>::attention(checked_isa(isa));
    const auto problem = attention_problem<T>(q, k, v, cosine, sine, mask, scale);
    check_like(dq, "dq", q);
    check_like(dk, "dk", k);
    check_like(dv, "dv", v);
    check_like(dout, "dout", q);
    check_like(out, "out", q);
    check_shape(log_sums, "log_sums", {size(q, 0), problem.heads, problem.length});
    T *to_q = values<T>(dq, "dq"), *to_k = values<T>(dk, "dk"), *to_v = values<T>(dv, "dv");
    const T *gradient = values<T>(dout, "dout"), *result = values<T>(out, "out");
    const float* logs = values<float>(log_sums, "log_sums");
    const Size parts = size(q, 0) * problem.groups;
    const nb::gil_scoped_release unlocked;
    parallel_with_scratch(parts, 1, threads, kernels.scratch_size(problem.length, problem.width),
                          [&](Size first, Size past, float* scratch) {
      for (Size part = first; part < past; ++part) {
        kernels.backward(problem, gradient, result, logs, to_q, to_k, to_v, part / problem.groups,
                         part % problem.groups, scratch);
      }
    });
  });
}

}  // namespace

void bind_training(nb::module_& m) {
  using nb::arg;
  m.def("rms_norm", &rms_norm, arg("y"), arg("rstd"), arg("x"), arg("weight"), arg("epsilon"),
        arg("isa"), arg("threads"));
  m.def("rms_norm_backward", &rms_norm_backward, arg("dx"), arg("dy"), arg("x"), arg("weight"),
        arg("rstd"), arg("isa"), arg("threads"));
  m.def("swiglu", &swiglu, arg("y"), arg("gate"), arg("up"), arg("isa"), arg("threads"));
  m.def("swiglu_backward", &swiglu_backward, arg("dgate"), arg("dup"), arg("dy"), arg("gate"),
        arg("up"), arg("isa"), arg("threads"));
  m.def("cross_entropy_", &cross_entropy_, arg("logits"), arg("loss"), arg("best"), arg("labels"),
        arg("gradient"), arg("isa"), arg("threads"));
  m.def("low_rank_project", &low_rank_project, arg("h"), arg("x"), arg("across"), arg("isa"),
        arg("threads"));
  m.def("low_rank_expand_", &low_rank_expand_, arg("y"), arg("h"), arg("first_column"),
        arg("factor"), arg("isa"), arg("threads"));
  m.def("low_rank_outer", &low_rank_outer, arg("out"), arg("h"), arg("first_column"), arg("x"),
        arg("isa"), arg("threads"));
  m.def("attention", &attention, arg("out"), arg("log_sums"), arg("q"), arg("k"), arg("v"),
        arg("cosine").none(), arg("sine").none(), arg("mask").none(), arg("scale"), arg("isa"),
        arg("threads"));
  m.def("attention_backward", &attention_backward, arg("dq"), arg("dk"), arg("dv"), arg("dout"),
        arg("out"), arg("log_sums"), arg("q"), arg("k"), arg("v"), arg("cosine").none(),
        arg("sine").none(), arg("mask").none(), arg("scale"), arg("isa"), arg("threads"));
}

}  // namespace fedkernels
