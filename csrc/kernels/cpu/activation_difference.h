// f(z) - f(z - u) of an activation f, as accurate as u itself however small u is beside z.
#pragma once

#include "activation.h"

namespace fastprune {
namespace {

// f'(x) for kGelu, kGeluTanh or kSilu.
template <class T, int Lanes>
inline Vec<T, Lanes> activation_derivative(Vec<T, Lanes> x, Activation activation) {
  using V = Vec<T, Lanes>;
  const V magnitude = x < V{} ? -x : x;
  if (activation == Activation::kGelu) {
    const V a = minimum(magnitude, broadcast<V>(T{13}));
    const V tail = normal_tail<Lanes>(a);
    // 1 / sqrt(2 pi), the height of the normal density.
    const V density = exp_clamped<Lanes>(a * a * T(-0.5)) * T(0.39894228040143268);
    return (x < V{} ? tail : T{1} - tail) + x * density;
  }
  // f(x) = x s(g(x)) with the logistic function s, so f' = s + x s (1 - s) g'.
  V argument = minimum(magnitude, broadcast<V>(T{80}));
  V slope = broadcast<V>(T{1});
  if (activation == Activation::kGeluTanh) {
    slope = argument * argument * T(3 * 0.07135481627260025) + T(1.5957691216057308);
    argument = argument * (argument * argument * T(0.07135481627260025) + T(1.5957691216057308));
    argument = minimum(argument, broadcast<V>(T{80}));
  }
  const V tail = logistic_tail<T, Lanes>(argument);
  return (x < V{} ? tail : T{1} - tail) + x * tail * (T{1} - tail) * slope;
}

// Below this |u| the integral of f' from z - u to z is taken by Gauss and Legendre's rule of two
// points, whose error is u^5 f''''' / 4320 (Abramowitz and Stegun, 25.4.30), above it the
// difference itself, which rounds to a few times 1e-8 (double: 1e-16): the bounds make both
// less than 1e-6 of u (double: 1e-12).
template <class T>
constexpr T kSmallStep = sizeof(T) == 4 ? T(1.0 / 16) : T(1.0 / 1024);

// max(z, 0) - max(z - u, 0). minimum() gives its second argument where either is NaN.
template <class V>
inline V relu_difference(V z, V u) {
  return z > V{} ? minimum(z, u) : minimum(V{}, u - z);
}

template <class T, int Lanes>
inline Vec<T, Lanes> activation_difference(Vec<T, Lanes> z, Vec<T, Lanes> u,
                                           Activation activation) {
  using V = Vec<T, Lanes>;
  // z - z passes on NaN and inf, which logits made of z have too.
  if (activation == Activation::kNone) return u + (z - z);
  const V rectified = relu_difference(z, u);
  if (activation == Activation::kRelu) return rectified;
  // min(max(z, 0), 6) is max(z, 0) - max(z - 6, 0).
  if (activation == Activation::kRelu6) return rectified - relu_difference(z - T{6}, u);
  const auto small = (u < kSmallStep<T>)&(u > -kSmallStep<T>);
  V integral = {};
  if (!all_lanes(~small)) {
    const V half = u * T(0.5), middle = z - half, offset = half * T(0.57735026918962576);
    integral = half * (activation_derivative<T, Lanes>(middle - offset, activation) +
                       activation_derivative<T, Lanes>(middle + offset, activation));
    if (all_lanes(small)) return integral;
  }
  const V tails =
      activation_tail<T, Lanes>(z, activation) - activation_tail<T, Lanes>(z - u, activation);
  return small ? integral : rectified - tails;
}

}  // namespace
}  // namespace fastprune
