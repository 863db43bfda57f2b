// One binding function a family of kernels; module.cc calls them all.
#pragma once

#include <nanobind/nanobind.h>

namespace fedkernels {

void bind_probes(nanobind::module_& m);
void bind_quantized(nanobind::module_& m);
void bind_sign_adapter(nanobind::module_& m);
void bind_training(nanobind::module_& m);

}  // namespace fedkernels
