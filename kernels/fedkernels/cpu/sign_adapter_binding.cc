#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>

#include "arrays.h"
#include "bindings.h"
#include "philox.h"
#include "sign_adapter.h"
#include "threads.h"

namespace fedkernels {

namespace portable { extern const SignKernels kSignKernels; }
#if defined(FK_HAS_X86)
namespace avx2 { extern const SignKernels kSignKernels; }
namespace avx512 { extern const SignKernels kSignKernels; }
namespace avx512vnni { extern void (*const kSignProduct)(const SignProduct&, const SignRange&); }
#endif
#if defined(FK_HAS_NEON)
namespace neon { extern const SignKernels kSignKernels; }
#endif

namespace {

// Streams of the factors of a rank-1 probe: blocks from here on (see reference/probes.py).
constexpr std::uint64_t kLeftBlock = std::uint64_t{1} << 63;
constexpr std::uint64_t kRightBlock = kLeftBlock + (std::uint64_t{1} << 62);

SignKernels kernels(Isa isa, bool coarse) {
  SignKernels chosen = portable::kSignKernels;
#if defined(FK_HAS_X86)
  if (isa == Isa::avx2) chosen = avx2::kSignKernels;
  if (isa == Isa::avx512) chosen = avx512::kSignKernels;
  if (isa == Isa::avx512 && coarse && has_avx512_vnni()) chosen.product = avx512vnni::kSignProduct;
#endif
#if defined(FK_HAS_NEON)
  if (isa == Isa::neon) chosen = neon::kSignKernels;
#endif
  static_cast<void>(isa);
  static_cast<void>(coarse);
  return chosen;
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void check_shape(const nb::ndarray<>& array, const char* name, std::int64_t rows,
                 std::int64_t columns) {
  if (array.ndim() != 2 || static_cast<std::int64_t>(array.shape(0)) != rows ||
      static_cast<std::int64_t>(array.shape(1)) != columns) {
    refuse(name, "must be [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
  }
}

std::uint32_t* sign_words(const nb::ndarray<>& words, const char* name, std::int64_t inner,
                          std::int64_t columns) {
  std::int32_t* data = elements<std::int32_t>(words, name, "int32");
  check_shape(words, name, divide_up(inner, 32), 32 * divide_up(columns, 32));
  return reinterpret_cast<std::uint32_t*>(data);
}

FloatType float_type(const nb::ndarray<>& array, const char* name) {
  if (array.dtype() == nb::dtype<float>()) return FloatType::float32;
  const auto bfloat = static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat);
  if (array.dtype() != nb::dlpack::dtype{bfloat, 16, 1}) refuse(name, "must be float32 or bfloat16");
  return FloatType::bfloat16;
}

// `words` [ceil(inner / 32), columns and some] holds S; out = x @ S * scale + add.
void sign_product_(const nb::ndarray<>& out, const nb::ndarray<>& x, const nb::ndarray<>& words,
                   const std::optional<nb::ndarray<>>& scale,
                   const std::optional<nb::ndarray<>>& add, bool coarse, int isa, int threads) {
  const SignKernels chosen = kernels(checked_isa(isa), coarse);
  if (x.ndim() != 2) refuse("x", "must have two dimensions");
  if (out.ndim() != 2) refuse("out", "must have two dimensions");
  SignProduct p{};
  p.rows = static_cast<std::int64_t>(x.shape(0));
  p.inner = static_cast<std::int64_t>(x.shape(1));
  p.columns = static_cast<std::int64_t>(out.shape(1));
  check_contiguous_cpu(x, "x");
  check_contiguous_cpu(out, "out");
  check_shape(out, "out", p.rows, p.columns);
  p.x = x.data();
  p.x_type = float_type(x, "x");
  p.out = out.data();
  p.out_type = float_type(out, "out");
  p.words = sign_words(words, "words", p.inner, p.columns);
  p.stride = 32 * divide_up(p.columns, 32);
  if (scale) {
    p.scale = elements<float>(*scale, "scale", "float32");
    if (static_cast<std::int64_t>(scale->size()) != p.columns) refuse("scale", "must be [columns]");
  }
  if (add) {
    check_contiguous_cpu(*add, "add");
    check_shape(*add, "add", p.rows, p.columns);
    if (float_type(*add, "add") != p.out_type) refuse("add", "must have the dtype of out");
    p.add = add->data();
  }
  const nb::gil_scoped_release unlocked;
  // As many columns a task as there may be, for each task makes its tables; fewer if rows are few.
  const std::int64_t row_tasks = divide_up(p.rows, kSignRows);
  const std::int64_t wanted = divide_up(2 * std::int64_t{std::max(threads, 1)}, std::max<std::int64_t>(row_tasks, 1));
  const std::int64_t even = 128 * divide_up(divide_up(p.columns, wanted), 128);
  const std::int64_t width = threads > 1 ? std::min(even, kSignColumns) : kSignColumns;
  const std::int64_t column_tasks = divide_up(p.columns, width);
  parallel_for(row_tasks * column_tasks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t row = task / column_tasks * kSignRows;
      const std::int64_t column = task % column_tasks * width;
      chosen.product(p, {row, std::min(row + kSignRows, p.rows), column,
                         std::min(column + width, p.columns)});
    }
  });
}

// The words of a matrix [inner, columns] become those of its transpose.
void sign_transpose_(const nb::ndarray<>& out, const nb::ndarray<>& words, int isa, int threads) {
  const SignKernels chosen = kernels(checked_isa(isa), false);
  if (words.ndim() != 2) refuse("words", "must have two dimensions");
  const auto rows = static_cast<std::int64_t>(words.shape(0));
  const auto stride = static_cast<std::int64_t>(words.shape(1));
  const std::uint32_t* from = sign_words(words, "words", 32 * rows, stride);
  std::uint32_t* to = sign_words(out, "out", stride, 32 * rows);
  const nb::gil_scoped_release unlocked;
  parallel_for(rows, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      chosen.transpose(from + row * stride, to + 32 * row, stride / 32, 32 * rows);
    }
  });
}

// The 4 x 32 bits of a block of one stream for each of 32 seeds (zeros where there are fewer), less
// the bits from `count` elements on.
void stream_block(const std::uint64_t* seeds, std::int64_t seed_count, std::uint64_t tensor_id,
                  std::uint64_t first_block, std::int64_t block, std::int64_t count,
                  std::uint32_t words[4][32]) {
  const std::uint64_t place = first_block + static_cast<std::uint64_t>(block);
  for (std::int64_t s = 0; s < 32; ++s) {
    Counter drawn{};
    if (s < seed_count) {
      drawn = philox4x32({static_cast<std::uint32_t>(place), static_cast<std::uint32_t>(place >> 32),
                          static_cast<std::uint32_t>(tensor_id),
                          static_cast<std::uint32_t>(tensor_id >> 32)},
                         {static_cast<std::uint32_t>(seeds[s]),
                          static_cast<std::uint32_t>(seeds[s] >> 32)});
    }
    for (std::int64_t w = 0; w < 4; ++w) {
      const std::int64_t left = count - 128 * block - 32 * w;
      const std::uint32_t mask = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1u : 0u;
      words[w][s] = drawn[static_cast<std::size_t>(w)] & mask;
    }
  }
}

// left: words of U [K, left_size], right: words of V transposed [right_size, K].
void sign_factors_(const nb::ndarray<>& left, const nb::ndarray<>& right,
                   const nb::ndarray<>& seeds, std::uint64_t tensor_id, std::int64_t left_size,
                   std::int64_t right_size, int threads) {
  if (seeds.ndim() != 1) refuse("seeds", "must have one dimension");
  if (left_size < 1 || right_size < 1) refuse("shape", "must have positive sizes");
  const auto count = static_cast<std::int64_t>(seeds.size());
  const auto* keys =
      reinterpret_cast<const std::uint64_t*>(elements<std::int64_t>(seeds, "seeds", "int64"));
  std::uint32_t* u = sign_words(left, "left", count, left_size);
  std::uint32_t* v = sign_words(right, "right", right_size, count);
  const std::int64_t u_stride = 32 * divide_up(left_size, 32);
  const std::int64_t v_stride = 32 * divide_up(count, 32);
  const nb::gil_scoped_release unlocked;
  parallel_for(divide_up(count, 32), 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::uint64_t* some = keys + 32 * row;
      const std::int64_t some_count = std::min<std::int64_t>(32, count - 32 * row);
      std::uint32_t words[4][32];
      for (std::int64_t b = 0; b < divide_up(left_size, 128); ++b) {
        stream_block(some, some_count, tensor_id, kLeftBlock, b, left_size, words);
        const std::int64_t tiles = std::min<std::int64_t>(4, divide_up(left_size, 32) - 4 * b);
        portable::kSignKernels.transpose(words[0], u + row * u_stride + 128 * b, tiles, 32);
      }
      for (std::int64_t b = 0; b < divide_up(right_size, 128); ++b) {
        stream_block(some, some_count, tensor_id, kRightBlock, b, right_size, words);
        const std::int64_t rows = std::min<std::int64_t>(4, divide_up(right_size, 32) - 4 * b);
        for (std::int64_t w = 0; w < rows; ++w) {
          std::copy(words[w], words[w] + 32, v + (4 * b + w) * v_stride + 32 * row);
        }
      }
    }
  });
}

}  // namespace

void bind_sign_adapter(nb::module_& m) {
  m.def("sign_product_", &sign_product_, nb::arg("out").noconvert(), nb::arg("x").noconvert(),
        nb::arg("words").noconvert(), nb::arg("scale").noconvert().none(),
        nb::arg("add").noconvert().none(), nb::arg("coarse"), nb::arg("isa"), nb::arg("threads"),
        "Write x @ signs * scale + add into out.");
  m.def("sign_transpose_", &sign_transpose_, nb::arg("out").noconvert(),
        nb::arg("words").noconvert(), nb::arg("isa"), nb::arg("threads"),
        "Write the words of a transposed sign matrix into out.");
  m.def("sign_factors_", &sign_factors_, nb::arg("left").noconvert(), nb::arg("right").noconvert(),
        nb::arg("seeds").noconvert(), nb::arg("tensor_id"), nb::arg("left_size"),
        nb::arg("right_size"), nb::arg("threads"),
        "Write the factors of rank-1 probes of these seeds.");
}

}  // namespace fedkernels
