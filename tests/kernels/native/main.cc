// Prints digests of what the kernels of one instruction set compute: the same lines on every machine.
// Without an argument it prints the names of the instruction sets that this processor has.

#include "checks.h"

namespace checks {

// A family is one file, one line here and one in `families`, and one in kernels/CMakeLists.txt.
void probes(fedkernels::Isa isa);
void sign_adapter(fedkernels::Isa isa);

namespace {

using Check = void (*)(fedkernels::Isa);
constexpr Check families[] = {probes, sign_adapter};

struct Named {
  const char* name;
  fedkernels::Isa isa;
};
constexpr Named sets[] = {{"portable", fedkernels::Isa::portable},
                          {"avx2", fedkernels::Isa::avx2},
                          {"avx512", fedkernels::Isa::avx512},
                          {"neon", fedkernels::Isa::neon}};

}  // namespace
}  // namespace checks

int main(int count, char** arguments) {
  for (const auto& [name, isa] : checks::sets) {
    if (!fedkernels::available(isa)) continue;
    if (count < 2) {
      std::printf("%s\n", name);
    } else if (std::strcmp(arguments[1], name) == 0) {
      for (const auto check : checks::families) check(isa);
      return 0;
    }
  }
  return count < 2 ? 0 : 1;
}
