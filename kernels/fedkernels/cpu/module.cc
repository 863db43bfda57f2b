// The Python module fedkernels._cpu. Tensors come in through DLPack, so nothing here depends on
// torch's headers or its binary interface.

#include "bindings.h"
#include "isa.h"

namespace nb = nanobind;

NB_MODULE(_cpu, m) {
  m.doc() = "Compiled kernels: the same results as fedkernels.reference, faster.";
  m.def("available", [](int isa) {
    return isa >= 0 && isa <= 3 && fedkernels::available(static_cast<fedkernels::Isa>(isa));
  }, nb::arg("isa"), "Whether kernels of this instruction set (isa.h) were built and can run here.");
  fedkernels::bind_probes(m);
  fedkernels::bind_quantized(m);
  fedkernels::bind_sign_adapter(m);
  fedkernels::bind_training(m);
}
