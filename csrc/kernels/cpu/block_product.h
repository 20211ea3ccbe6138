// How the product of ../block_product.h is cut on the CPU.
//
// Sums accumulate in T, in the order of the entries, one fused multiply-add for each step
// (baseline: a product and an addition), so the bits depend neither on the number of threads nor on
// the other samples nor on the kernel chosen.
#pragma once

#include "../block_product.h"

namespace fastprune {

// The samples form groups; the grid of (group, list) is walked group by group.
// A list costs its entries plus one, times the group's width, so that equal ranges of positions are
// equal work whatever the pattern.
struct BlockProductWork {
  int64_t units;         // samples, or vectors of samples where `transposed`
  int64_t groups;        // group g has units [g * units / groups, (g + 1) * units / groups)
  int64_t total;         // positions: units * (entries + lists)
  int64_t scratch_size;  // elements that each thread needs
  bool transposed;
  bool stream_output;  // past the caches
};

}  // namespace fastprune
