// What the checks of all families share: numbers that are the same on every machine, a digest of what
// a kernel wrote, and the row of a family's table for an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "isa.h"

// FK_DECLARE(SignKernels, kSignKernels) at namespace level, then FK_TABLE(isa, kSignKernels).
#if defined(FK_HAS_X86)
#define FK_DECLARE(Table, name)                             \
  namespace fedkernels::portable { extern const Table name; } \
  namespace fedkernels::avx2 { extern const Table name; }     \
  namespace fedkernels::avx512 { extern const Table name; }
#define FK_TABLE(isa, name)                              \
  ((isa) == fedkernels::Isa::avx512 ? fedkernels::avx512::name \
   : (isa) == fedkernels::Isa::avx2 ? fedkernels::avx2::name   \
                                    : fedkernels::portable::name)
#elif defined(FK_HAS_NEON)
#define FK_DECLARE(Table, name)                             \
  namespace fedkernels::portable { extern const Table name; } \
  namespace fedkernels::neon { extern const Table name; }
#define FK_TABLE(isa, name) \
  ((isa) == fedkernels::Isa::neon ? fedkernels::neon::name : fedkernels::portable::name)
#else
#define FK_DECLARE(Table, name) \
  namespace fedkernels::portable { extern const Table name; }
#define FK_TABLE(isa, name) fedkernels::portable::name
#endif

namespace checks {

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): integers only.
class Numbers {
 public:
  explicit Numbers(std::uint64_t seed) : state_(seed) {}

  std::uint64_t word() {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(word() % static_cast<std::uint64_t>(high - low + 1));
  }

  // In (-1, 1), a multiple of 2^-20: exact in float32.
  float number() { return static_cast<float>(between(-(1 << 20) + 1, (1 << 20) - 1)) * 0x1p-20f; }

 private:
  std::uint64_t state_;
};

// FNV-1a, 64 bits: tells outputs apart that are not made to collide.
template <typename T>
std::uint64_t digest(const std::vector<T>& values) {
  std::uint64_t hash = 0xCBF29CE484222325u;
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (std::size_t i = 0; i < values.size() * sizeof(T); ++i) {
    hash = (hash ^ bytes[i]) * 0x100000001B3u;
  }
  return hash;
}

// One line a case: the driver compares the lines of all instruction sets and machines.
inline void report(const char* family, int number, std::uint64_t value) {
  std::printf("%s %d %016llx\n", family, number, static_cast<unsigned long long>(value));
}

constexpr int kCases = 100;  // random shapes a family

}  // namespace checks
