// RMSNorm, SwiGLU and the softmax cross-entropy: each reads its inputs once and keeps nothing.
#include <cmath>

#include "vectors.h"

namespace fedkernels::FK_ISA {
namespace {


template <typename T>
Floats load_at(const T* p, std::int64_t i, std::int64_t n) {
  return i + kLanes <= n ? load(p + i) : load_some(p + i, n - i);
}

template <typename T>
void store_at(T* p, Floats v, std::int64_t i, std::int64_t n) {
  if (i + kLanes <= n) {
    store(p + i, v);
  } else {
    store_some(p + i, v, n - i);
  }
}

template <typename T>
void rms_norm(T* y, float* rstd, const T* x, const T* weight, std::int64_t rows, std::int64_t n,
              float epsilon) {
  for (std::int64_t row = 0; row < rows; ++row, x += n, y += n) {
    Floats squares{};
    for (std::int64_t i = 0; i < n; i += kLanes) {
      const Floats v = load_at(x, i, n);
      squares = multiply_add(v, v, squares);
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + epsilon);
    rstd[row] = scale;
    for (std::int64_t i = 0; i < n; i += kLanes) {
      // Rounded before the weight, as the models that this stands for do.
      const Floats normal = rounded_to(y, load_at(x, i, n) * broadcast(scale));
      store_at(y, normal * load_at(weight, i, n), i, n);
    }
  }
}

// With u = x rstd and g = dy weight: dx = rstd (g - u mean(g u)).
template <typename T>
void rms_norm_backward(T* dx, const T* dy, const T* x, const T* weight, const float* rstd,
                       std::int64_t rows, std::int64_t n) {
  for (std::int64_t row = 0; row < rows; ++row, x += n, dy += n, dx += n) {
    Floats dots{};
    for (std::int64_t i = 0; i < n; i += kLanes) {
      dots = multiply_add(load_at(dy, i, n) * load_at(weight, i, n), load_at(x, i, n), dots);
    }
    const float scale = rstd[row];
    const float slope = sum(dots) * scale * scale / static_cast<float>(n);
    for (std::int64_t i = 0; i < n; i += kLanes) {
      const Floats g = load_at(dy, i, n) * load_at(weight, i, n);
      const Floats d = multiply_add(load_at(x, i, n), broadcast(-slope), g);
      store_at(dx, d * broadcast(scale), i, n);
    }
  }
}

Floats sigmoid(Floats v) { return 1.0f / (1.0f + exponential(-v)); }

template <typename T>
void swiglu(T* y, const T* gate, const T* up, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Floats g = load_at(gate, i, count);
    store_at(y, g * sigmoid(g) * load_at(up, i, count), i, count);
  }
}

template <typename T>
void swiglu_backward(T* dgate, T* dup, const T* dy, const T* gate, const T* up,
                     std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Floats g = load_at(gate, i, count);
    const Floats d = load_at(dy, i, count);
    const Floats s = sigmoid(g);
    const Floats slope = s * multiply_add(g, 1.0f - s, broadcast(1.0f));
    store_at(dgate, d * load_at(up, i, count) * slope, i, count);
    store_at(dup, d * g * s, i, count);
  }
}

template <typename T>
void cross_entropy(T* logits, float* loss, std::int64_t* best, const std::int64_t* labels,
                   std::int64_t rows, std::int64_t n, bool gradient) {
  const std::int64_t whole = n - n % kLanes;
  for (std::int64_t row = 0; row < rows; ++row, logits += n) {
    Floats most = broadcast(-INFINITY);
    for (std::int64_t i = 0; i < whole; i += kLanes) most = maximum(load(logits + i), most);
    if (whole < n) most = maximum(load_some(logits + whole, n - whole, -INFINITY), most);
    const float peak = largest(most);
    std::int64_t first = 0;
    while (first < n && !(to_float(logits[first]) == peak)) ++first;
    best[row] = first < n ? first : 0;

    Floats sums{};
    for (std::int64_t i = 0; i < whole; i += kLanes) {
      sums = sums + exponential(load(logits + i) - broadcast(peak));
    }
    if (whole < n) {
      sums = sums + exponential(load_some(logits + whole, n - whole, -INFINITY) - broadcast(peak));
    }
    const float total = sum(sums);
    const float log_sum = peak + std::log(total);
    const float wanted = to_float(logits[labels[row]]);
    loss[row] = log_sum - wanted;
    if (!gradient) continue;
    const Floats scale = broadcast(1.0f / total);
    for (std::int64_t i = 0; i < n; i += kLanes) {
      const Floats p = exponential(load_at(logits, i, n) - broadcast(peak)) * scale;
      store_at(logits, p, i, n);
    }
    // From the unrounded probability: 1 - p loses its digits where p is near 1.
    const float probability = std::exp(wanted - log_sum);
    assign(logits + labels[row], probability - 1.0f);
  }
}

template <typename T>
constexpr RowKernels<T> table = {rms_norm<T>, rms_norm_backward<T>, swiglu<T>, swiglu_backward<T>,
                                 cross_entropy<T>};

}  // namespace

extern const RowKernels<float> kRowKernelsF32;
extern const RowKernels<Bf16> kRowKernelsBf16;
const RowKernels<float> kRowKernelsF32 = table<float>;
const RowKernels<Bf16> kRowKernelsBf16 = table<Bf16>;

}  // namespace fedkernels::FK_ISA
