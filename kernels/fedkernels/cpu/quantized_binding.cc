#include "quantized.h"

#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "threads.h"

namespace fedkernels {
namespace {

using i64 = std::int64_t;
using Optional = std::optional<nb::ndarray<>>;

constexpr i64 kGrain = 1 << 14;  // weights of the smallest piece of work for a thread

constexpr i64 kRowsAhead = 4;

// torch's bfloat16 and float16, which C++17 has no types for.
constexpr nb::dlpack::dtype kBfloat16{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
constexpr nb::dlpack::dtype kFloat16{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};

void check_size(const nb::ndarray<>& array, const char* name, i64 size) {
  if (static_cast<i64>(array.size()) != size) {
    refuse(name, "must have " + std::to_string(size) + " elements");
  }
}

const void* halves(const nb::ndarray<>& array, const char* name, nb::dlpack::dtype type) {
  if (array.dtype() != type) refuse(name, "has the wrong type of 16 bits");
  check_contiguous_cpu(array, name);
  return array.data();
}

i64 parts(i64 count, i64 size) { return (count + size - 1) / size; }

// A matrix and the tensors that keep its memory alive.
struct Matrix {
  QuantizedMatrix view;
  std::vector<nb::ndarray<>> owners;

  Matrix(const nb::ndarray<>& codes, const nb::ndarray<>& scales, const Optional& minimums,
         const Optional& nested_scales, const Optional& nested_code, const Optional& nested_offset,
         const Optional& table, i64 rows, i64 columns, i64 block, i64 nested_block)
      : view{} {
    if (rows < 1 || columns < 1) refuse("shape", "must be positive");
    if (block < 1 || nested_block < 1) refuse("block", "must be positive");
    if (table && block % 2) refuse("block", "must be even");
    const i64 blocks = parts(rows * columns, block);
    view.rows = rows;
    view.columns = columns;
    view.block = block;
    view.nested_block = nested_block;
    check_size(codes, "codes", table ? parts(rows * columns, 2) : rows * columns);
    if (table) {
      view.codes = elements<std::uint8_t>(codes, "codes", "uint8");
      view.table = elements<float>(*table, "table", "float32");
      check_size(*table, "table", 16);
      owners.push_back(*table);
    } else {
      const auto* bytes = elements<std::int8_t>(codes, "codes", "int8");
      view.codes = reinterpret_cast<const std::uint8_t*>(bytes);
    }
    check_size(scales, "scales", blocks);
    if (scales.dtype() == nb::dtype<float>()) {
      view.scale_type = ScaleType::float32;
      view.scales = elements<float>(scales, "scales", "float32");
    } else if (scales.dtype() == kFloat16) {
      view.scale_type = ScaleType::float16;
      view.scales = halves(scales, "scales", kFloat16);
    } else {
      view.scale_type = ScaleType::nested;
      view.scales = elements<std::uint8_t>(scales, "scales", "float32, float16 or uint8");
      if (!nested_scales || !nested_code || !nested_offset) refuse("scales", "lack their nested ones");
      view.nested_scales = elements<float>(*nested_scales, "nested_scales", "float32");
      view.nested_code = elements<float>(*nested_code, "nested_code", "float32");
      view.nested_offset = elements<float>(*nested_offset, "nested_offset", "float32");
      check_size(*nested_scales, "nested_scales", parts(blocks, nested_block));
      check_size(*nested_code, "nested_code", 256);
      check_size(*nested_offset, "nested_offset", 1);
      owners.insert(owners.end(), {*nested_scales, *nested_code, *nested_offset});
    }
    if (minimums) {
      check_size(*minimums, "minimums", blocks);
      view.minimums = static_cast<const std::uint16_t*>(halves(*minimums, "minimums", kFloat16));
      owners.push_back(*minimums);
    }
    owners.insert(owners.end(), {codes, scales});
  }
};

const QuantizedKernels& kernels(int isa) {
  switch (checked_isa(isa)) {
#if defined(FK_HAS_X86)
    case Isa::avx2:
      return avx2::kQuantizedKernels;
    case Isa::avx512:
      return avx512::kQuantizedKernels;
#endif
#if defined(FK_HAS_NEON)
    case Isa::neon:
      return neon::kQuantizedKernels;
#endif
    default:
      return portable::kQuantizedKernels;
  }
}

const QuantizedRowKernels& row_kernels(int isa) {
  switch (checked_isa(isa)) {
#if defined(FK_HAS_X86)
    case Isa::avx2:
      return avx2::kQuantizedRowKernels;
    case Isa::avx512:
      return has_avx512_bf16() ? avx512_bf16::kQuantizedRowKernels : avx512::kQuantizedRowKernels;
#endif
#if defined(FK_HAS_NEON)
    case Isa::neon:
      return neon::kQuantizedRowKernels;
#endif
    default:
      return portable::kQuantizedRowKernels;
  }
}

// Asks for the codes of a piece of a row that will be needed soon. Pieces of a panel of columns are
// too short and too far apart for the processor to foresee: without this they take four times as long.
void prefetch_codes(const QuantizedMatrix& matrix, i64 first, i64 count) {
#if defined(__GNUC__)
  const i64 per_byte = matrix.table ? 2 : 1;
  const std::uint8_t* codes = matrix.codes + first / per_byte;
  for (i64 byte = 0; byte < count / per_byte; byte += 64) __builtin_prefetch(codes + byte);
#endif
}

void dequantize_(const nb::ndarray<>& out, const Matrix& matrix, i64 first_row, i64 first_column,
                 int isa, int threads) {
  const QuantizedKernels& kernel = kernels(isa);
  const QuantizedMatrix& view = matrix.view;
  if (out.ndim() != 2) refuse("out", "must be a matrix");
  const i64 rows = static_cast<i64>(out.shape(0)), columns = static_cast<i64>(out.shape(1));
  if (first_row < 0 || first_row > view.rows - rows) refuse("first_row", "leaves the matrix");
  if (first_column < 0 || first_column > view.columns - columns) {
    refuse("first_column", "leaves the matrix");
  }
  if (rows == 0 || columns == 0) return;
  const bool bfloat16 = out.dtype() == kBfloat16;
  auto* halves_out = bfloat16 ? static_cast<std::uint16_t*>(const_cast<void*>(
                                    halves(out, "out", kBfloat16)))
                              : nullptr;
  float* floats_out = bfloat16 ? nullptr : elements<float>(out, "out", "float32 or bfloat16");
  const nb::gil_scoped_release unlocked;
  parallel_for(rows, parts(kGrain, columns), threads, [&](i64 begin, i64 end) {
    // Whole rows follow each other in the result as in the matrix: one stretch, few ragged ends.
    const i64 at_once = columns == view.columns ? end - begin : 1;
    for (i64 row = begin; row < end; row += at_once) {
      const i64 first = (first_row + row) * view.columns + first_column;
      const i64 past = first + at_once * columns;
      const i64 ahead = row + kRowsAhead < end ? kRowsAhead * view.columns : 0;
      if (at_once == 1 && ahead > 0) prefetch_codes(view, first + ahead, columns);
      if (bfloat16) {
        kernel.to_bfloat16(view, first, past, halves_out + row * columns);
      } else {
        kernel.to_float32(view, first, past, floats_out + row * columns);
      }
    }
  });
}

void few_rows_(const nb::ndarray<>& y, const nb::ndarray<>& x, const Matrix& matrix,
               const Optional& bias, int isa, int threads) {
  const QuantizedRowKernels& kernel = row_kernels(isa);
  const QuantizedMatrix& view = matrix.view;
  if (x.ndim() != 2 || x.shape(0) < 1 || static_cast<i64>(x.shape(0)) > kFewRows) {
    refuse("x", "must have from 1 to " + std::to_string(kFewRows) + " rows");
  }
  const i64 rows = static_cast<i64>(x.shape(0)), columns = view.columns;
  check_size(x, "x", rows * columns);
  check_size(y, "y", rows * view.rows);
  if (x.dtype() != y.dtype()) refuse("y", "must have the type of x");
  FewRows input{};
  input.bfloat16 = x.dtype() == kBfloat16;
  const void* from = input.bfloat16 ? halves(x, "x", kBfloat16)
                                    : elements<float>(x, "x", "float32 or bfloat16");
  input.y = input.bfloat16 ? const_cast<void*>(halves(y, "y", kBfloat16))
                           : elements<float>(y, "y", "float32");
  if (bias) {
    check_size(*bias, "bias", view.rows);
    input.bias = elements<float>(*bias, "bias", "float32");
  }
  const nb::gil_scoped_release unlocked;
  input.rows = rows;
  input.stride = parts(columns, 16) * 16;
  input.layout = kernel.layout(view, input.bfloat16);
  std::vector<float> memory(static_cast<std::size_t>(rows * input.stride + 16));
  // From a cache line's start on: a register's load that crosses lines takes twice as long.
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  float* arranged = memory.data() + (64 - address % 64) % 64 / sizeof(float);
  kernel.arrange(from, input.bfloat16, rows, columns, input.stride, input.layout, arranged);
  input.x = arranged;
  const i64 grain = parts(parts(kGrain, columns), 8) * 8;
  parallel_for(view.rows, grain, threads,
               [&](i64 begin, i64 end) { kernel.multiply(view, input, begin, end); });
}

// Calls body(block, its first value, how many it has) for all blocks of `count` values.
template <typename Body>
void for_each_block(i64 count, i64 block, int threads, const Body& body) {
  if (block < 1) refuse("block", "must be positive");
  const nb::gil_scoped_release unlocked;
  parallel_for(parts(count, block), parts(kGrain, block), threads, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      const i64 left = count - i * block;
      body(i, i * block, left < block ? left : block);
    }
  });
}

void block_ranges_(const nb::ndarray<>& values, i64 block, const nb::ndarray<>& low,
                   const nb::ndarray<>& high, int isa, int threads) {
  const QuantizedKernels& kernel = kernels(isa);
  const float* from = elements<float>(values, "values", "float32");
  const i64 count = static_cast<i64>(values.size());
  if (block < 1) refuse("block", "must be positive");
  check_size(low, "low", parts(count, block));
  check_size(high, "high", parts(count, block));
  float* lows = elements<float>(low, "low", "float32");
  float* highs = elements<float>(high, "high", "float32");
  for_each_block(count, block, threads, [&](i64 i, i64 first, i64 size) {
    kernel.range(from + first, size, lows + i, highs + i);
  });
}

// How the codes are found: nearest border of a table, equal steps from a minimum, or signed steps.
void encode_(const nb::ndarray<>& values, i64 block, const nb::ndarray<>& inverse,
             const Optional& borders, const Optional& minimums, const nb::ndarray<>& codes, int isa,
             int threads) {
  const QuantizedKernels& kernel = kernels(isa);
  const float* from = elements<float>(values, "values", "float32");
  const float* inverses = elements<float>(inverse, "inverse", "float32");
  const i64 count = static_cast<i64>(values.size());
  if (block < 1) refuse("block", "must be positive");
  check_size(inverse, "inverse", parts(count, block));
  if (!borders && !minimums) {
    check_size(codes, "codes", count);
    std::int8_t* out = elements<std::int8_t>(codes, "codes", "int8");
    for_each_block(count, block, threads, [&](i64 i, i64 first, i64 size) {
      kernel.encode_int8(from + first, size, inverses[i], out + first);
    });
    return;
  }
  if (block % 2) refuse("block", "must be even");
  check_size(codes, "codes", parts(count, 2));
  std::uint8_t* out = elements<std::uint8_t>(codes, "codes", "uint8");
  if (borders) {
    check_size(*borders, "borders", 15);
    const float* edges = elements<float>(*borders, "borders", "float32");
    for_each_block(count, block, threads, [&](i64 i, i64 first, i64 size) {
      kernel.encode_table(from + first, size, edges, inverses[i], out + first / 2);
    });
  } else {
    check_size(*minimums, "minimums", parts(count, block));
    const float* starts = elements<float>(*minimums, "minimums", "float32");
    for_each_block(count, block, threads, [&](i64 i, i64 first, i64 size) {
      kernel.encode_steps(from + first, size, starts[i], inverses[i], out + first / 2);
    });
  }
}

}  // namespace

void bind_quantized(nb::module_& m) {
  using Array = const nb::ndarray<>&;
  nb::class_<Matrix>(m, "QuantizedMatrix", "The parts of a QuantizedTensor on the CPU, checked.")
      .def(nb::init<Array, Array, const Optional&, const Optional&, const Optional&, const Optional&,
                    const Optional&, i64, i64, i64, i64>(),
           nb::arg("codes"), nb::arg("scales"), nb::arg("minimums").none(),
           nb::arg("nested_scales").none(), nb::arg("nested_code").none(),
           nb::arg("nested_offset").none(), nb::arg("table").none(), nb::arg("rows"),
           nb::arg("columns"), nb::arg("block"), nb::arg("nested_block"));
  m.def("dequantize_", &dequantize_, nb::arg("out").noconvert(), nb::arg("matrix"),
        nb::arg("first_row"), nb::arg("first_column"), nb::arg("isa"), nb::arg("threads"),
        "Write a part of a quantised matrix into a float32 or bfloat16 one.");
  m.def("quantized_few_rows_", &few_rows_, nb::arg("y").noconvert(), nb::arg("x").noconvert(),
        nb::arg("matrix"), nb::arg("bias").none(), nb::arg("isa"), nb::arg("threads"),
        "Write x Wᵀ + bias into y, for a few rows x.");
  m.def("block_ranges_", &block_ranges_, nb::arg("values").noconvert(), nb::arg("block"),
        nb::arg("low").noconvert(), nb::arg("high").noconvert(), nb::arg("isa"), nb::arg("threads"),
        "Write the smallest and largest value of each block.");
  m.def("quantize_codes_", &encode_, nb::arg("values").noconvert(), nb::arg("block"),
        nb::arg("inverse").noconvert(), nb::arg("borders").none(), nb::arg("minimums").none(),
        nb::arg("codes").noconvert(), nb::arg("isa"), nb::arg("threads"),
        "Write the codes of the values, from the inverse scale of each block.");
}

}  // namespace fedkernels
