// The Python module fedkernels._cpu. Tensors come in through DLPack, so nothing here depends on
// torch's headers or its binary interface.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>

#include <limits>
#include <string>

#include "philox.h"
#include "rademacher.h"

namespace nb = nanobind;

namespace {

void check_float32_contiguous(const nb::ndarray<>& array, const char* name) {
  const std::string prefix = std::string(name) + " must be ";
  if (array.device_type() != nb::device::cpu::value) {
    throw nb::value_error((prefix + "on the CPU").c_str());
  }
  if (array.dtype() != nb::dtype<float>()) {
    throw nb::value_error((prefix + "float32").c_str());
  }
  std::int64_t expected = 1;  // the stride of a row-major array, from the last dimension on
  for (std::size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) != 1 && array.stride(i) != expected && array.size() != 0) {
      throw nb::value_error((prefix + "contiguous").c_str());
    }
    expected *= static_cast<std::int64_t>(array.shape(i));
  }
}

void rademacher_(const nb::ndarray<>& out, std::uint64_t seed, std::uint64_t tensor_id,
                 std::uint64_t first_element) {
  check_float32_contiguous(out, "out");
  const std::size_t count = out.size();
  if (count > std::numeric_limits<std::uint64_t>::max() - first_element) {
    throw nb::value_error("first_element lies beyond the last element of the probe");
  }
  float* data = static_cast<float*>(out.data());
  const nb::gil_scoped_release unlocked;
  fedkernels::rademacher(data, count, seed, tensor_id, first_element);
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "Compiled kernels for any CPU: the same bits as fedkernels.reference, faster.";
  m.def("rademacher_", &rademacher_, nb::arg("out").noconvert(), nb::arg("seed"),
        nb::arg("tensor_id"), nb::arg("first_element"),
        "Write consecutive elements of a Rademacher probe into a contiguous float32 tensor.");
  m.def("philox4x32", &fedkernels::philox4x32, nb::arg("counter"), nb::arg("key"),
        "Return the four words of Philox4x32-10 at a counter under a key.");
}
