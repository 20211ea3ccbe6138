// f(z) - f(z - u) of an activation f, as accurate as u itself however small u is beside z: the
// formulas of ../cpu/activation.h and ../cpu/activation_difference.h, with CUDA's own erfcf, expf
// and division.
#pragma once

#include "../types.h"

namespace fastprune {
namespace {

// The second argument where either is NaN.
__device__ inline float minimum(float a, float b) { return a < b ? a : b; }

// 1 / (1 + exp(a)) for a in [0, 80].
__device__ inline float logistic_tail(float a) {
  const float e = expf(-a);
  return e / (e + 1.0f);
}

// erfc(a / sqrt(2)) / 2 for a in [0, 13].
__device__ inline float normal_tail(float a) { return 0.5f * erfcf(a * 0.70710678f); }

// The argument of the logistic form of the tanh one, 2 sqrt(2 / pi) (a + 0.044715 a^3): Hendrycks
// and Gimpel, Gaussian Error Linear Units (2016).
__device__ inline float tanh_argument(float a) {
  return minimum(a * (a * a * 0.07135481627f + 1.59576912f), 80.0f);
}

// max(x, 0) - f(x).
template <Activation activation>
__device__ float activation_tail(float x) {
  const float magnitude = fabsf(x);
  if constexpr (activation == Activation::kGelu) {
    const float a = minimum(magnitude, 13.0f);
    return a * normal_tail(a);
  } else {
    const float a = minimum(magnitude, 80.0f);
    return a * logistic_tail(activation == Activation::kSilu ? a : tanh_argument(a));
  }
}

template <Activation activation>
__device__ float activation_derivative(float x) {
  if constexpr (activation == Activation::kGelu) {
    const float a = minimum(fabsf(x), 13.0f), tail = normal_tail(a);
    // 1 / sqrt(2 pi), the height of the normal density.
    const float density = expf(a * a * -0.5f) * 0.398942280f;
    return fmaf(x, density, x < 0.0f ? tail : 1.0f - tail);
  } else {
    // f(x) = x s(g(x)) with the logistic function s, so f' = s + x s (1 - s) g'.
    const float a = minimum(fabsf(x), 80.0f);
    constexpr bool kTanh = activation == Activation::kGeluTanh;
    const float slope = kTanh ? a * a * (3 * 0.07135481627f) + 1.59576912f : 1.0f;
    const float tail = logistic_tail(kTanh ? tanh_argument(a) : a);
    return (x < 0.0f ? tail : 1.0f - tail) + x * tail * (1.0f - tail) * slope;
  }
}

// Below this |u| the integral of f' from z - u to z is taken by Gauss and Legendre's rule of two
// points, whose error is u^5 f''''' / 4320 (Abramowitz and Stegun, 25.4.30), above it the
// difference itself, which rounds to a few times 1e-8.
constexpr float kSmallStep = 1.0f / 16;

template <Activation activation>
__device__ float activation_difference(float z, float u) {
  // z - z passes on NaN and inf, which logits made of z have too.
  if constexpr (activation == Activation::kNone) return u + (z - z);
  // max(z, 0) - max(z - u, 0).
  const float rectified = z > 0.0f ? minimum(z, u) : minimum(0.0f, u - z);
  if constexpr (activation == Activation::kRelu) {
    return rectified;
  } else {
    if (fabsf(u) < kSmallStep) {
      const float half = u * 0.5f, middle = z - half, offset = half * 0.577350269f;
      return half * (activation_derivative<activation>(middle - offset) +
                     activation_derivative<activation>(middle + offset));
    }
    return rectified - (activation_tail<activation>(z) - activation_tail<activation>(z - u));
  }
}

}  // namespace
}  // namespace fastprune
