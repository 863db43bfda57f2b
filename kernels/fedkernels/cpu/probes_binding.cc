#include <nanobind/stl/array.h>

#include <limits>

#include "arrays.h"
#include "bindings.h"
#include "philox.h"
#include "probes.h"

namespace fedkernels {
namespace {

void rademacher_(const nb::ndarray<>& out, std::uint64_t seed, std::uint64_t tensor_id,
                 std::uint64_t first_element) {
  float* data = elements<float>(out, "out", "float32");
  const std::size_t count = out.size();
  if (count > std::numeric_limits<std::uint64_t>::max() - first_element) {
    refuse("first_element", "lies beyond the last element of the probe");
  }
  const nb::gil_scoped_release unlocked;
  rademacher(data, count, seed, tensor_id, first_element);
}

}  // namespace

void bind_probes(nb::module_& m) {
  m.def("rademacher_", &rademacher_, nb::arg("out").noconvert(), nb::arg("seed"),
        nb::arg("tensor_id"), nb::arg("first_element"),
        "Write consecutive elements of a Rademacher probe into a contiguous float32 tensor.");
  m.def("philox4x32", &philox4x32, nb::arg("counter"), nb::arg("key"),
        "Return the four words of Philox4x32-10 at a counter under a key.");
}

}  // namespace fedkernels
