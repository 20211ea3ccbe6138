#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../kernels/cuda/block_sparse_linear_plan.h"

namespace fastprune {

// Adds to `_C` the host functions that compute launch geometry. They need no GPU, so that tests
// run each kernel's PTX with the very plan its launcher uses.
void define_launch_plans(pybind11::module_& module);

// Those of block_sparse_conv2d, which the above adds too.
void define_convolution_plans(pybind11::module_& module);

pybind11::dict as_dict(const LaunchPlan& plan);
LinearArithmetic parse_arithmetic(const std::string& name);

}  // namespace fastprune
