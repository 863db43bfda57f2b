#pragma once

#include <cstddef>
#include <cstdint>

namespace fedkernels {

// Writes elements first .. first + count - 1 of the Rademacher probe of (seed, tensor_id).
void rademacher(float* out, std::size_t count, std::uint64_t seed, std::uint64_t tensor_id,
                std::uint64_t first);

}  // namespace fedkernels
