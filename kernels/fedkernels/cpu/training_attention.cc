// Attention of a block of queries over all keys that they may see, in fp32 scratch that stays in the
// cache. One call does one batch and one group of heads, so keys and values are widened and rotated
// once for all heads that share them, and their gradients are summed without a race. q, k and v are
// read as the linear layers wrote them; rotary positions are applied on the way in and, transposed,
// to the gradients on the way out. The backward pass rebuilds the probabilities from the stored log of
// each row's sum (Dao et al., "FlashAttention", 2022, algorithm 4), so nothing of size length^2 is kept.
#include <cmath>

#include "small_gemm.h"

namespace fedkernels::FK_ISA {
namespace {

constexpr std::int64_t kQueries = 48;  // in a block; a multiple of the tiles' rows

std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

struct Scratch {
  std::int64_t wide, long_;  // width and length, padded
  float *keys, *keys_across, *values, *values_across, *dkeys, *dvalues;  // [length, width] or across
  float *query, *dout, *dquery, *scores, *dscores, *deltas;

  Scratch(float* memory, std::int64_t length, std::int64_t width)
      : wide(padded(width)), long_(padded(length)) {
    auto take = [&memory](std::int64_t count) {
      float* taken = memory;
      memory += count;
      return taken;
    };
    keys = take(long_ * wide);
    keys_across = take(long_ * wide);
    values = take(long_ * wide);
    values_across = take(long_ * wide);
    dkeys = take(long_ * wide);
    dvalues = take(long_ * wide);
    query = take(kQueries * wide);
    dout = take(kQueries * wide);
    dquery = take(kQueries * wide);
    scores = take(kQueries * long_);
    dscores = take(kQueries * long_);
    deltas = take(kQueries);
  }
};

std::int64_t scratch_size(std::int64_t length, std::int64_t width) {
  const std::int64_t wide = padded(width), long_ = padded(length);
  return 6 * long_ * wide + 3 * kQueries * wide + 2 * kQueries * long_ + kQueries;
}

// x <- x cos + rotate_half(x) sin (Su et al., "RoFormer", 2021, in the halves' layout of Llama);
// `back` is the transpose of that map, which its gradient needs.
template <typename T>
void rotate(float* x, const T* cosine, const T* sine, std::int64_t width, bool back) {
  const std::int64_t half = width / 2;
  for (std::int64_t i = 0; i < half; i += kLanes) {
    const std::int64_t count = smaller(kLanes, half - i);
    const bool whole = count == kLanes;
    auto get = [&](const auto* p) { return whole ? load(p) : load_some(p, count); };
    const Floats low = get(x + i), high = get(x + half + i);
    Floats low_sine = get(sine + i), high_sine = get(sine + half + i);
    const Floats low_cosine = get(cosine + i), high_cosine = get(cosine + half + i);
    Floats a, b;
    if (back) {
      a = multiply_add(high, high_sine, low * low_cosine);
      b = multiply_add(low, -low_sine, high * high_cosine);
    } else {
      a = multiply_add(high, -low_sine, low * low_cosine);
      b = multiply_add(low, high_sine, high * high_cosine);
    }
    if (whole) {
      store(x + i, a);
      store(x + half + i, b);
    } else {
      store_some(x + i, a, count);
      store_some(x + half + i, b, count);
    }
  }
}

template <typename T>
void store_row(T* to, const float* from, std::int64_t n, float scale = 1.0f) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i) * broadcast(scale));
  if (i < n) store_some(to + i, load(from + i) * broadcast(scale), n - i);
}

// One batch and group, with what the kernels ask of it.
template <typename T>
struct Part {
  const AttentionProblem<T>& p;
  std::int64_t batch, group;

  std::int64_t sharing() const { return p.heads / p.groups; }
  std::int64_t query_at(std::int64_t row, std::int64_t head) const {
    return ((batch * p.length + row) * p.heads + head) * p.width;
  }
  std::int64_t key_at(std::int64_t row) const {
    return ((batch * p.length + row) * p.groups + group) * p.width;
  }
  void rotate_row(float* x, std::int64_t row, bool back) const {
    if (p.cosine == nullptr) return;
    const std::int64_t at = batch * p.table_stride + row * p.width;
    rotate(x, p.cosine + at, p.sine + at, p.width, back);
  }
  const std::uint8_t* mask_row(std::int64_t row) const {
    return p.mask + batch * p.mask_stride + row * p.length;
  }
  // How many keys the queries first .. past - 1 need: beyond the last that one may look at, none.
  std::int64_t reach(std::int64_t first, std::int64_t past) const {
    if (p.mask == nullptr) return past;
    std::int64_t most = 0;
    for (std::int64_t row = first; row < past; ++row) {
      std::int64_t last = p.length;
      while (last > most && mask_row(row)[last - 1] == 0) --last;
      most = last > most ? last : most;
    }
    return most;
  }
  void hide(float* scores, std::int64_t row, std::int64_t reach, std::int64_t wide) const {
    if (p.mask == nullptr) {
      for (std::int64_t j = row + 1; j < wide; ++j) scores[j] = -INFINITY;
      return;
    }
    const std::uint8_t* allowed = mask_row(row);
    for (std::int64_t j = 0; j < reach; ++j) {
      if (allowed[j] == 0) scores[j] = -INFINITY;
    }
    for (std::int64_t j = reach; j < wide; ++j) scores[j] = -INFINITY;
  }
  void load_query(const Scratch& s, std::int64_t first, std::int64_t past,
                  std::int64_t head) const {
    for (std::int64_t row = first; row < past; ++row) {
      float* to = s.query + (row - first) * s.wide;
      widen_row(to, p.q + query_at(row, head), p.width);
      rotate_row(to, row, false);
      for (std::int64_t i = 0; i < s.wide; i += kLanes) {
        store(to + i, load(to + i) * broadcast(p.scale));
      }
    }
  }
};

void transpose(float* to, const float* from, std::int64_t rows, std::int64_t columns,
               std::int64_t to_stride, std::int64_t from_stride) {
  constexpr std::int64_t kTile = 16;
  for (std::int64_t i = 0; i < to_stride; i += kTile) {
    for (std::int64_t j = 0; j < columns; ++j) {
      for (std::int64_t k = i; k < smaller(i + kTile, to_stride); ++k) {
        to[j * to_stride + k] = k < rows ? from[k * from_stride + j] : 0.0f;
      }
    }
  }
}

template <typename T>
void load_keys(const Part<T>& part, const Scratch& s) {
  const AttentionProblem<T>& p = part.p;
  for (std::int64_t row = 0; row < p.length; ++row) {
    float* key = s.keys + row * s.wide;
    widen_row(key, p.k + part.key_at(row), p.width);
    part.rotate_row(key, row, false);
    widen_row(s.values + row * s.wide, p.v + part.key_at(row), p.width);
  }
  transpose(s.keys_across, s.keys, p.length, s.wide, s.long_, s.wide);
}

template <typename T>
void forward(const AttentionProblem<T>& p, T* out, float* log_sums, std::int64_t batch,
             std::int64_t group, float* memory) {
  const Part<T> part{p, batch, group};
  const Scratch s(memory, p.length, p.width);
  load_keys(part, s);
  for (std::int64_t shared = 0; shared < part.sharing(); ++shared) {
    const std::int64_t head = group * part.sharing() + shared;
    float* logs = log_sums + (batch * p.heads + head) * p.length;
    for (std::int64_t first = 0; first < p.length; first += kQueries) {
      const std::int64_t past = smaller(first + kQueries, p.length), rows = past - first;
      const std::int64_t reach = part.reach(first, past), wide = padded(reach);
      part.load_query(s, first, past, head);
      gemm({s.query, s.wide, 1}, s.keys_across, s.long_, s.scores, s.long_, rows, wide, p.width,
           false);
      for (std::int64_t i = 0; i < rows; ++i) {
        float* scores = s.scores + i * s.long_;
        part.hide(scores, first + i, reach, wide);
        Floats most = broadcast(-INFINITY), sums{};
        for (std::int64_t j = 0; j < wide; j += kLanes) most = maximum(load(scores + j), most);
        const float peak = wide > 0 ? largest(most) : -INFINITY;
        // A query that may look at nothing attends to nothing: probabilities and gradients are 0.
        const Floats shift = broadcast(peak == -INFINITY ? 0.0f : peak);
        for (std::int64_t j = 0; j < wide; j += kLanes) {
          const Floats e = exponential(load(scores + j) - shift);
          sums = sums + e;
          store(scores + j, e);
        }
        const float total = sum(sums);
        logs[first + i] = total == 0.0f ? INFINITY : peak + std::log(total);
        s.deltas[i] = total == 0.0f ? 0.0f : 1.0f / total;
      }
      gemm({s.scores, s.long_, 1}, s.values, s.wide, s.dquery, s.wide, rows, s.wide, reach, false);
      for (std::int64_t i = 0; i < rows; ++i) {
        store_row(out + part.query_at(first + i, head), s.dquery + i * s.wide, p.width,
                  s.deltas[i]);
      }
    }
  }
}

template <typename T>
void backward(const AttentionProblem<T>& p, const T* dout, const T* out, const float* log_sums,
              T* dq, T* dk, T* dv, std::int64_t batch, std::int64_t group, float* memory) {
  const Part<T> part{p, batch, group};
  const Scratch s(memory, p.length, p.width);
  load_keys(part, s);
  transpose(s.values_across, s.values, p.length, s.wide, s.long_, s.wide);
  std::memset(s.dkeys, 0, static_cast<std::size_t>(s.long_ * s.wide) * sizeof(float));
  std::memset(s.dvalues, 0, static_cast<std::size_t>(s.long_ * s.wide) * sizeof(float));
  for (std::int64_t shared = 0; shared < part.sharing(); ++shared) {
    const std::int64_t head = group * part.sharing() + shared;
    const float* logs = log_sums + (batch * p.heads + head) * p.length;
    for (std::int64_t first = 0; first < p.length; first += kQueries) {
      const std::int64_t past = smaller(first + kQueries, p.length), rows = past - first;
      const std::int64_t reach = part.reach(first, past), wide = padded(reach);
      part.load_query(s, first, past, head);
      for (std::int64_t i = 0; i < rows; ++i) {
        // delta = sum over width of dout * out = sum over keys of P * dP
        const std::int64_t at = part.query_at(first + i, head);
        float* d = s.dout + i * s.wide;
        float* o = s.dquery + i * s.wide;
        widen_row(d, dout + at, p.width);
        widen_row(o, out + at, p.width);
        Floats products{};
        for (std::int64_t j = 0; j < s.wide; j += kLanes) {
          products = multiply_add(load(d + j), load(o + j), products);
        }
        s.deltas[i] = sum(products);
      }
      gemm({s.query, s.wide, 1}, s.keys_across, s.long_, s.scores, s.long_, rows, wide, p.width,
           false);
      gemm({s.dout, s.wide, 1}, s.values_across, s.long_, s.dscores, s.long_, rows, wide, p.width,
           false);
      for (std::int64_t i = 0; i < rows; ++i) {
        float* scores = s.scores + i * s.long_;
        float* dscores = s.dscores + i * s.long_;
        part.hide(scores, first + i, reach, wide);
        const Floats shift = broadcast(logs[first + i]), delta = broadcast(s.deltas[i]);
        for (std::int64_t j = 0; j < wide; j += kLanes) {
          const Floats probability = exponential(load(scores + j) - shift);
          store(scores + j, probability);
          store(dscores + j, probability * (load(dscores + j) - delta));
        }
      }
      gemm({s.scores, 1, s.long_}, s.dout, s.wide, s.dvalues, s.wide, reach, s.wide, rows, true);
      gemm({s.dscores, 1, s.long_}, s.query, s.wide, s.dkeys, s.wide, reach, s.wide, rows, true);
      gemm({s.dscores, s.long_, 1}, s.keys, s.wide, s.dquery, s.wide, rows, s.wide, reach, false);
      for (std::int64_t i = 0; i < rows; ++i) {
        float* d = s.dquery + i * s.wide;
        part.rotate_row(d, first + i, true);
        store_row(dq + part.query_at(first + i, head), d, p.width, p.scale);
      }
    }
  }
  for (std::int64_t row = 0; row < p.length; ++row) {
    part.rotate_row(s.dkeys + row * s.wide, row, true);
    store_row(dk + part.key_at(row), s.dkeys + row * s.wide, p.width);
    store_row(dv + part.key_at(row), s.dvalues + row * s.wide, p.width);
  }
}

template <typename T>
constexpr AttentionKernels<T> table = {scratch_size, forward<T>, backward<T>};

}  // namespace

extern const AttentionKernels<float> kAttentionKernelsF32;
extern const AttentionKernels<Bf16> kAttentionKernelsBf16;
const AttentionKernels<float> kAttentionKernelsF32 = table<float>;
const AttentionKernels<Bf16> kAttentionKernelsBf16 = table<Bf16>;

}  // namespace fedkernels::FK_ISA
