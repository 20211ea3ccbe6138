#pragma once

#include <pybind11/pybind11.h>

namespace fastprune {

// Adds to `_C` the host functions that compute launch geometry. They need no GPU, so that tests
// run each kernel's PTX with the very plan its launcher uses.
void define_launch_plans(pybind11::module_& module);

}  // namespace fastprune
