#include "launch_plans.h"

namespace fastprune {

void define_launch_plans(pybind11::module_&) {}

}  // namespace fastprune
