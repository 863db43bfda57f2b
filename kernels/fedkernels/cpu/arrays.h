// Checks of the tensors that come in from Python: what passes may be used as a plain pointer.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>

#include "isa.h"

namespace fedkernels {

namespace nb = nanobind;

[[noreturn]] inline void refuse(const char* name, const std::string& what) {
  throw nb::value_error((std::string(name) + " " + what).c_str());
}

inline void check_contiguous_cpu(const nb::ndarray<>& array, const char* name) {
  if (array.device_type() != nb::device::cpu::value) refuse(name, "must be on the CPU");
  std::int64_t expected = 1;  // the stride of a row-major array, from the last dimension on
  for (std::size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) != 1 && array.stride(i) != expected && array.size() != 0) {
      refuse(name, "must be contiguous");
    }
    expected *= static_cast<std::int64_t>(array.shape(i));
  }
}

// A pointer to the elements of a contiguous CPU tensor of type T (`type` is its name for a person).
template <typename T>
T* elements(const nb::ndarray<>& array, const char* name, const char* type) {
  if (array.dtype() != nb::dtype<T>()) refuse(name, std::string("must be ") + type);
  check_contiguous_cpu(array, name);
  return static_cast<T*>(array.data());
}

inline Isa checked_isa(int isa) {
  if (isa < 0 || isa > 3 || !available(static_cast<Isa>(isa))) {
    refuse("isa", "names no instruction set of this processor");
  }
  return static_cast<Isa>(isa);
}

}  // namespace fedkernels
