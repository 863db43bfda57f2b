#include "isa.h"

namespace fedkernels {

bool available(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
#if defined(FK_HAS_X86)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(FK_HAS_NEON)
    case Isa::neon:
      return true;  // part of every 64-bit ARM processor
#endif
    default:
      return false;
  }
}

bool has_avx512_bf16() {
#if defined(FK_HAS_X86)
  return available(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_avx512_vnni() {
#if defined(FK_HAS_X86)
  return available(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool has_avx512_vpopcntdq() {
#if defined(FK_HAS_X86)
  return available(Isa::avx512) && __builtin_cpu_supports("avx512vpopcntdq");
#else
  return false;
#endif
}

}  // namespace fedkernels
