// out[row][sample] = sum_step weight[row][step] * panel[step][sample], for three vectors of
// samples.
#pragma once

#include "vec.h"

namespace fastprune {
namespace {

constexpr int kGroupVectors = 3;
template <class T>
constexpr int kGroup = kGroupVectors * kLanes<T>;
// As many rows as the registers hold accumulators for: 24 of 32 with AVX-512, 12 of 16 without.
constexpr int kTileRows = FASTPRUNE_VECTOR_BYTES == 64 ? 8 : 4;

// Not inlined: among its callers' variables GCC keeps accumulators in memory.
template <class T, int Rows>
__attribute__((noinline)) void product_tile(const T* panel, int64_t panel_stride, const T* weight,
                                            int64_t weight_stride, int64_t steps, T* out,
                                            int64_t out_stride) {
  using V = Vec<T, kLanes<T>>;
  V sums[Rows][kGroupVectors] = {};
  for (int64_t step = 0; step < steps; ++step) {
    V samples[kGroupVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kGroupVectors; ++v) {
      samples[v] = load<V>(panel + step * panel_stride + v * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const V factor = broadcast<V>(weight[r * weight_stride + step]);
#pragma GCC unroll 3
      for (int v = 0; v < kGroupVectors; ++v) sums[r][v] += samples[v] * factor;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kGroupVectors; ++v) {
      store(out + r * out_stride + v * kLanes<T>, sums[r][v]);
    }
  }
}

template <class T, int Rows = kTileRows>
void product(const T* panel, int64_t panel_stride, const T* weight, int64_t weight_stride,
             int64_t rows, int64_t steps, T* out, int64_t out_stride) {
  int64_t row = 0;
  for (; row + Rows <= rows; row += Rows) {
    product_tile<T, Rows>(panel, panel_stride, weight + row * weight_stride, weight_stride, steps,
                          out + row * out_stride, out_stride);
  }
  if constexpr (Rows > 1) {
    if (row < rows) {
      product<T, Rows / 2>(panel, panel_stride, weight + row * weight_stride, weight_stride,
                           rows - row, steps, out + row * out_stride, out_stride);
    }
  }
}

}  // namespace
}  // namespace fastprune
