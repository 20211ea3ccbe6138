// The tensor-core kernels of one type, named as in block_sparse_linear_plan.h.
#pragma once

#include "block_sparse_linear.h"
#include "few_samples.cuh"

// kBlocks thread blocks fit the registers of a multiprocessor.
#define FASTPRUNE_TILE_KERNEL(kernel, T, Tile, kStepsTogether, kAligned, kBlocks) \
  extern "C" __global__ void __launch_bounds__(Tile::kThreads, kBlocks)           \
      kernel(const BlockProductArgs<T> args) {                                    \
    TileProduct<BlockProductArgs, T, Tile, kStepsTogether, kAligned>(args).run(); \
  }

#define FASTPRUNE_FEW_SAMPLES_KERNEL(kernel, T, kStepsTogether, kAligned) \
  extern "C" __global__ void __launch_bounds__(32 * kFewWarps)            \
      kernel(const BlockProductArgs<T> args) {                            \
    FewSamplesProduct<T, kStepsTogether, kAligned>(args).run();           \
  }

// All kernels of one direction, and name##_kernels, which holds them in the order of LinearTile.
#define FASTPRUNE_BLOCK_PRODUCT_KERNELS(name, T, kStepsTogether)                           \
  FASTPRUNE_FEW_SAMPLES_KERNEL(name##_few_samples, T, kStepsTogether, true)                \
  FASTPRUNE_FEW_SAMPLES_KERNEL(name##_few_samples_narrow, T, kStepsTogether, false)        \
  FASTPRUNE_TILE_KERNEL(name##_64x64_by_16, T, SmallTile, kStepsTogether, true, 4)         \
  FASTPRUNE_TILE_KERNEL(name##_64x64_by_16_narrow, T, SmallTile, kStepsTogether, false, 4) \
  FASTPRUNE_TILE_KERNEL(name##_256x64_by_16, T, LargeTile<16>, kStepsTogether, true, 2)    \
  FASTPRUNE_TILE_KERNEL(name##_256x64_by_32, T, LargeTile<32>, kStepsTogether, true, 2)    \
  FASTPRUNE_TILE_KERNEL(name##_256x64_by_64, T, LargeTile<64>, kStepsTogether, true, 2)    \
  constexpr void (*name##_kernels[])(                                                      \
      BlockProductArgs<T>) = {name##_few_samples,  name##_few_samples_narrow,              \
                              name##_64x64_by_16,  name##_64x64_by_16_narrow,              \
                              name##_256x64_by_16, name##_256x64_by_32,                    \
                              name##_256x64_by_64};
