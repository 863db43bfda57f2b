#include "checks.h"
#include "probes.h"

namespace checks {

void probes(fedkernels::Isa) {  // this family has one implementation for all instruction sets
  Numbers numbers(1);
  for (int i = 0; i < kCases; ++i) {
    std::vector<float> out(static_cast<std::size_t>(numbers.between(0, 1000)));
    const std::uint64_t seed = numbers.word(), tensor_id = numbers.word();
    fedkernels::rademacher(out.data(), out.size(), seed, tensor_id, numbers.word() >> 1);
    report("rademacher", i, digest(out));
  }
}

}  // namespace checks
