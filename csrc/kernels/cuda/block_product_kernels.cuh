// The tensor-core kernels of one type, named as in block_sparse_linear_plan.h.
#pragma once

#include "block_sparse_linear.h"
#include "few_samples.cuh"

// Two thread blocks fit a multiprocessor's registers with tiles of 128 x 128, four with 64 x 64.
#define FASTPRUNE_TILE_KERNEL(name, T, kStepsTogether, kSide, kStrip, kBlocks)       \
  extern "C" __global__ void __launch_bounds__(kTileThreads, kBlocks)                \
      name##_##kSide##x##kSide##_by_##kStrip(const BlockProductArgs<T> args) {       \
    using Product = TileProduct<T, kStepsTogether, kSide, kSide, kStrip>;            \
    static_assert(Product::kSharedBytes == kTileStages * 2 * kSide * kTileRowBytes); \
    Product(args).run();                                                             \
  }

// All kernels of one direction, and name##_kernels, which holds them in the order of LinearTile.
#define FASTPRUNE_BLOCK_PRODUCT_KERNELS(name, T, kStepsTogether)                          \
  extern "C" __global__ void __launch_bounds__(32 * kFewWarps)                            \
      name##_few_samples(const BlockProductArgs<T> args) {                                \
    FewSamplesProduct<T, kStepsTogether>(args).run();                                     \
  }                                                                                       \
  FASTPRUNE_TILE_KERNEL(name, T, kStepsTogether, 64, 16, 4)                               \
  FASTPRUNE_TILE_KERNEL(name, T, kStepsTogether, 128, 16, 2)                              \
  FASTPRUNE_TILE_KERNEL(name, T, kStepsTogether, 128, 32, 2)                              \
  FASTPRUNE_TILE_KERNEL(name, T, kStepsTogether, 128, 64, 2)                              \
  constexpr void (*name##_kernels[])(BlockProductArgs<T>) = {                             \
      name##_few_samples, name##_64x64_by_16, name##_128x128_by_16, name##_128x128_by_32, \
      name##_128x128_by_64};
