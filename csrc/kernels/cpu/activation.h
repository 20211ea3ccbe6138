// Activations of a vector. All but relu6 have the form max(x, 0) - |x| q(|x|), with q from 1/2 at 0
// to 0 at infinity: nothing cancels where the result is small, and NaN stays NaN.
#pragma once

#include "../types.h"
#include "vec.h"

namespace fastprune {
namespace {

// erfc(a / sqrt(2)) / 2 for a in [0, 13].
// Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26: erfc(z) is exp(-z^2)
// times a polynomial in 1 / (1 + 0.3275911 z), whose absolute error is 1.5e-7.
template <int Lanes>
inline Vec<float, Lanes> normal_tail(Vec<float, Lanes> a) {
  using Float = Vec<float, Lanes>;
  const Float t = 1.0f / (a * (0.3275911f * 0.707106781f) + 1.0f);
  Float p = broadcast<Float>(0.5f * 1.061405429f);
  p = p * t + 0.5f * -1.453152027f;
  p = p * t + 0.5f * 1.421413741f;
  p = p * t + 0.5f * -0.284496736f;
  p = p * t + 0.5f * 0.254829592f;
  return p * t * exp_clamped<Lanes>(a * a * -0.5f);
}

template <int Lanes>
inline Vec<double, Lanes> normal_tail(Vec<double, Lanes> a) {
  for (int lane = 0; lane < Lanes; ++lane) a[lane] = 0.5 * ::erfc(a[lane] * 0.70710678118654752);
  return a;
}

// 1 / (1 + exp(a)) for a in [0, 80].
template <class T, int Lanes>
inline Vec<T, Lanes> logistic_tail(Vec<T, Lanes> a) {
  const Vec<T, Lanes> e = exp_clamped<Lanes>(-a);
  return e / (e + T{1});
}

// |x| q(|x|) = max(x, 0) - f(x), of kGelu, kGeluTanh or kSilu.
template <class T, int Lanes>
inline Vec<T, Lanes> activation_tail(Vec<T, Lanes> x, Activation activation) {
  using V = Vec<T, Lanes>;
  const V magnitude = x < V{} ? -x : x;
  if (activation == Activation::kGelu) {
    const V a = minimum(magnitude, broadcast<V>(T{13}));
    return a * normal_tail<Lanes>(a);
  }
  const V a = minimum(magnitude, broadcast<V>(T{80}));
  if (activation == Activation::kSilu) return a * logistic_tail<T, Lanes>(a);
  // Hendrycks and Gimpel, Gaussian Error Linear Units (2016): the logistic form of the tanh one,
  // 2 sqrt(2 / pi) (a + 0.044715 a^3).
  const V argument = a * (a * a * T(0.07135481627260025) + T(1.5957691216057308));
  return a * logistic_tail<T, Lanes>(minimum(argument, broadcast<V>(T{80})));
}

template <class T, int Lanes>
inline Vec<T, Lanes> activate(Vec<T, Lanes> x, Activation activation) {
  using V = Vec<T, Lanes>;
  if (activation == Activation::kNone) return x;
  const V positive = x < V{} ? V{} : x;
  if (activation == Activation::kRelu) return positive;
  if (activation == Activation::kRelu6) return positive > T{6} ? broadcast<V>(T{6}) : positive;
  return positive - activation_tail<T, Lanes>(x, activation);
}

}  // namespace
}  // namespace fastprune
