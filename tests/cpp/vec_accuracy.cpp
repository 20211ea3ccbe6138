// The vectorised exp, expm1 and log1p against the C library in double, over their whole range and
// in every lane: prints the largest errors, relative and in units in the last place, and fails past
// the bounds that cpu/vec.h states.
#include "cpu/vec.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

namespace fastprune {
namespace {

// Steps through the floats themselves, so that small arguments are covered as well as large ones.
std::vector<float> floats_between(float low, float high, size_t multiple) {
  std::vector<float> values;
  for (float magnitude = 1e-30f; magnitude <= std::max(-low, high); magnitude *= 1.00001f) {
    if (magnitude <= high) values.push_back(magnitude);
    if (-magnitude >= low) values.push_back(-magnitude);
  }
  values.push_back(low);
  values.push_back(high);
  values.resize((values.size() + multiple - 1) / multiple * multiple, 0.0f);
  return values;
}

struct Errors {
  double relative = 0.0, ulp = 0.0;

  void add(float found, double wanted) {
    const double error = std::abs(found - wanted);
    if (!(error >= 0.0)) relative = ulp = INFINITY;
    if (wanted == 0.0) {
      if (error != 0.0) relative = ulp = INFINITY;
      return;
    }
    relative = std::max(relative, error / std::abs(wanted));
    ulp = std::max(ulp, std::ldexp(error, 23 - std::ilogb(wanted)));
  }
};

template <int Lanes, class Function, class Exact>
bool measure(const char* name, float low, float high, Function function, Exact exact,
             double relative_bound, double ulp_bound) {
  using Float = Vec<float, Lanes>;
  const std::vector<float> values = floats_between(low, high, Lanes);
  Errors errors;
  for (size_t i = 0; i < values.size(); i += Lanes) {
    const Float found = function(load<Float>(values.data() + i));
    for (int lane = 0; lane < Lanes; ++lane)
      errors.add(found[lane], exact(double(values[i + lane])));
  }
  std::printf("%s, %d lanes: %.3e relative, %.3f ulp\n", name, Lanes, errors.relative, errors.ulp);
  return errors.relative < relative_bound && errors.ulp < ulp_bound;
}

template <int Lanes>
bool within_bounds() {
  using Float = Vec<float, Lanes>;
  const bool exp_holds = measure<Lanes>(
      "exp", -87.0f, 87.0f, [](Float x) { return exp_clamped<Lanes>(x); },
      [](double x) { return std::exp(x); }, kExpRelativeError, kExpUlpError);
  const bool expm1_holds = measure<Lanes>(
      "expm1", -80.0f, 80.0f, [](Float x) { return expm1_clamped<Lanes>(x); },
      [](double x) { return std::expm1(x); }, kExpm1RelativeError, kExpm1UlpError);
  const bool log1p_holds = measure<Lanes>(
      "log1p", -0.95f, 1e30f, [](Float x) { return log1p_clamped<Lanes>(x); },
      [](double x) { return std::log1p(x); }, kLog1pRelativeError, kLog1pUlpError);
  return exp_holds && expm1_holds && log1p_holds;
}

}  // namespace
}  // namespace fastprune

int main() {
  using namespace fastprune;
  bool holds = within_bounds<4>();
  if constexpr (kLanes<float> >= 8) holds &= within_bounds<8>();
  if constexpr (kLanes<float> >= 16) holds &= within_bounds<16>();
  return holds ? 0 : 1;
}
