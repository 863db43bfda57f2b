#include <algorithm>

#include "checks.h"
#include "sign_adapter.h"
#include "threads.h"

FK_DECLARE(SignKernels, kSignKernels)

namespace checks {
namespace {

using fedkernels::FloatType;

template <typename T>
void product(Numbers& numbers, const fedkernels::SignKernels& kernels, FloatType type, int number) {
  const std::int64_t rows = numbers.between(1, 20), inner = numbers.between(1, 400);
  const std::int64_t columns = numbers.between(1, 400), stride = (columns + 31) / 32 * 32;
  std::vector<std::uint32_t> words(static_cast<std::size_t>((inner + 31) / 32 * stride));
  std::vector<T> x(static_cast<std::size_t>(rows * inner));
  std::vector<T> out(static_cast<std::size_t>(rows * columns));
  std::vector<float> scale(static_cast<std::size_t>(columns));
  const auto fill = [&](std::vector<T>& values) {
    for (T& value : values) {
      const float drawn = numbers.number();
      // the upper half of a float32 is a bfloat16
      std::uint32_t bits;
      std::memcpy(&bits, &drawn, sizeof bits);
      bits >>= 32 - 8 * sizeof(T);
      std::memcpy(&value, &bits, sizeof(T));  // the machines of these checks are little-endian
    }
  };
  for (std::uint32_t& word : words) word = static_cast<std::uint32_t>(numbers.word());
  for (float& value : scale) value = numbers.number();
  fill(x);
  fill(out);
  const fedkernels::SignProduct p{x.data(), type,    words.data(), stride,       rows,     inner,
                                  columns,  scale.data(), out.data(),   out.data(), type};
  fedkernels::parallel_for(rows, 8, 3, [&](std::int64_t begin, std::int64_t end) {
    kernels.product(p, {begin, end, 0, columns});
  });
  report(type == FloatType::float32 ? "sign_product_float32" : "sign_product_bfloat16", number,
         digest(out));
}

void transpose(Numbers& numbers, const fedkernels::SignKernels& kernels, int number) {
  const std::int64_t tiles = numbers.between(1, 9), stride = 32 * numbers.between(1, 4);
  std::vector<std::uint32_t> words(static_cast<std::size_t>(32 * tiles));
  std::vector<std::uint32_t> out(static_cast<std::size_t>(tiles * stride));
  for (std::uint32_t& word : words) word = static_cast<std::uint32_t>(numbers.word());
  kernels.transpose(words.data(), out.data(), tiles, stride);
  report("sign_transpose", number, digest(out));
}

}  // namespace

void sign_adapter(fedkernels::Isa isa) {
  const fedkernels::SignKernels& kernels = FK_TABLE(isa, kSignKernels);
  Numbers numbers(2);
  for (int i = 0; i < kCases; ++i) {
    product<float>(numbers, kernels, FloatType::float32, i);
    product<std::uint16_t>(numbers, kernels, FloatType::bfloat16, i);
    transpose(numbers, kernels, i);
  }
}

}  // namespace checks
