// Instruction sets that a kernel may be compiled for, and which of them this processor has.
//
// A family of kernels is one source file, compiled once for each set (CMakeLists.txt) with FK_ISA
// defined as its name; it puts everything into namespace fedkernels::FK_ISA and ends in a table of
// function pointers, from which the binding picks the row that the caller asked for. Such a file must
// not use inline functions or templates of the standard library: the linker keeps one copy of each,
// and if that were the copy compiled for AVX-512, older processors would stop at it.
#pragma once

#include <cstdint>

namespace fedkernels {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, neon = 3 };

// Whether this build has kernels for the set and this processor, and its system, can run them.
bool available(Isa isa);

// avx512 with BF16 dot products, VNNI and popcounts: a refinement inside the backend "avx512".
bool has_avx512_bf16();
bool has_avx512_vnni();
bool has_avx512_vpopcntdq();

}  // namespace fedkernels
