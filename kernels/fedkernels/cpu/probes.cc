#include "probes.h"

#include <algorithm>
#include <cstring>

#include "philox.h"

namespace fedkernels {
namespace {

constexpr std::size_t kBlock = 128;  // elements of one counter: four words of 32 bits
constexpr std::uint32_t kOne = 0x3F800000u;  // the bits of 1.0f

std::uint32_t low(std::uint64_t value) { return static_cast<std::uint32_t>(value); }
std::uint32_t high(std::uint64_t value) { return static_cast<std::uint32_t>(value >> 32); }

// A set bit of the generator becomes the sign bit of 1.0f. Written through integers, for no
// floating-point instruction can then round, contract or depend on the processor's mode.
void expand(const Counter& words, float* out) {
  std::uint32_t bits[kBlock];
  for (std::size_t w = 0; w < 4; ++w) {
    for (std::uint32_t i = 0; i < 32; ++i) {
      bits[32 * w + i] = kOne | (((words[w] >> i) & 1u) << 31);
    }
  }
  std::memcpy(out, bits, sizeof bits);
}

}  // namespace

void rademacher(float* out, std::size_t count, std::uint64_t seed, std::uint64_t tensor_id,
                std::uint64_t first) {
  const Key key{low(seed), high(seed)};
  std::uint64_t block = first / kBlock;
  std::size_t skip = static_cast<std::size_t>(first % kBlock);
  for (; count > 0; ++block, skip = 0) {
    const Counter words = philox4x32({low(block), high(block), low(tensor_id), high(tensor_id)}, key);
    const std::size_t take = std::min(kBlock - skip, count);
    if (take == kBlock) {
      expand(words, out);
    } else {
      float whole[kBlock];
      expand(words, whole);
      std::memcpy(out, whole + skip, take * sizeof(float));
    }
    out += take;
    count -= take;
  }
}

}  // namespace fedkernels
