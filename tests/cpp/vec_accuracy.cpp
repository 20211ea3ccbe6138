// The vectorised exp, expm1 and log1p against the C library in double, over their whole range:
// prints the largest errors and fails past the bounds that cpu/vec.h states.
#include "cpu/vec.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace fastprune {
namespace {

using Float = Vec<float, 4>;

// Steps through the floats themselves, so that small arguments are covered as well as large ones.
template <class Visit>
void for_each_float(float low, float high, float step, Visit visit) {
  for (float magnitude = 1e-30f; magnitude <= std::max(-low, high); magnitude *= step) {
    if (magnitude <= high) visit(magnitude);
    if (-magnitude >= low) visit(-magnitude);
  }
}

int run() {
  double exp_error = 0.0, expm1_error = 0.0, log1p_error = 0.0;
  for_each_float(-87.0f, 87.0f, 1.00001f, [&](float x) {
    const double found = exp_clamped<4>(broadcast<Float>(x))[0], wanted = std::exp(double(x));
    exp_error = std::max(exp_error, std::abs(found - wanted) / wanted);
  });
  for_each_float(-80.0f, 80.0f, 1.00001f, [&](float x) {
    const double found = expm1_clamped<4>(broadcast<Float>(x))[0], wanted = std::expm1(double(x));
    expm1_error = std::max(expm1_error, std::abs(found - wanted) / std::abs(wanted));
  });
  for_each_float(-0.95f, 1e30f, 1.00001f, [&](float x) {
    const double found = log1p_clamped<4>(broadcast<Float>(x))[0], wanted = std::log1p(double(x));
    log1p_error = std::max(log1p_error, std::abs(found - wanted) / std::abs(wanted));
  });
  std::printf("exp %.2e, expm1 %.2e, log1p %.2e\n", exp_error, expm1_error, log1p_error);
  const bool zero_is_exact =
      expm1_clamped<4>(Float{})[0] == 0.0f && log1p_clamped<4>(Float{})[0] == 0.0f;
  return zero_is_exact && exp_error < kExpRelativeError && expm1_error < kExpm1RelativeError &&
                 log1p_error < kLog1pRelativeError
             ? 0
             : 1;
}

}  // namespace
}  // namespace fastprune

int main() { return fastprune::run(); }
