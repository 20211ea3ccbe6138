// Activations of a float. All but relu6 have the form max(x, 0) - |x| q(|x|), with q from 1/2 at 0
// to 0 at infinity, as on the CPU (../cpu/activation.h): nothing cancels where the result is small,
// and NaN stays NaN.
#pragma once

#include "../types.h"

namespace fastprune {

// |x| q(|x|) = max(x, 0) - f(x), of kGelu, kGeluTanh or kSilu. The bounds keep powers finite; q is
// 0 in float there, or smaller than any other rounding.
__device__ __forceinline__ float activation_tail(float x, Activation activation) {
  if (activation == Activation::kGelu) {
    // erfc(a / sqrt(2)) / 2. Abramowitz and Stegun, Handbook of Mathematical Functions (1964),
    // 7.1.26: erfc(z) is exp(-z^2) times a polynomial in 1 / (1 + 0.3275911 z), whose absolute
    // error is 1.5e-7.
    const float a = fabsf(x) < 13.0f ? fabsf(x) : 13.0f;
    const float t = __fdividef(1.0f, fmaf(a, 0.3275911f * 0.707106781f, 1.0f));
    float p = 0.5f * 1.061405429f;
    p = fmaf(p, t, 0.5f * -1.453152027f);
    p = fmaf(p, t, 0.5f * 1.421413741f);
    p = fmaf(p, t, 0.5f * -0.284496736f);
    p = fmaf(p, t, 0.5f * 0.254829592f);
    return a * p * t * __expf(a * a * -0.5f);
  }
  const float a = fabsf(x) < 80.0f ? fabsf(x) : 80.0f;
  float argument = a;
  if (activation == Activation::kGeluTanh) {
    // Hendrycks and Gimpel, Gaussian Error Linear Units (2016): the logistic form of the tanh one,
    // 2 sqrt(2 / pi) (a + 0.044715 a^3).
    argument = fminf(a * fmaf(a * a, 0.07135481627260025f, 1.5957691216057308f), 80.0f);
  }
  const float e = __expf(-argument);
  return a * __fdividef(e, e + 1.0f);
}

__device__ __forceinline__ float activate(float x, Activation activation) {
  if (activation == Activation::kNone) return x;
  // Compared, not fmaxf, which would turn NaN into a number.
  const float positive = x < 0.0f ? 0.0f : x;
  if (activation == Activation::kRelu) return positive;
  if (activation == Activation::kRelu6) return positive > 6.0f ? 6.0f : positive;
  return positive - activation_tail(x, activation);
}

}  // namespace fastprune
