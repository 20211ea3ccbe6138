// The product of ../block_product.h for few samples and weights of 16 bits, which are widened in
// registers: it is bound by reading the weights, and these are half as many bytes.
#pragma once

#include "../block_product.h"

namespace fastprune {

// Beyond these it is faster to widen all weights once, and to multiply them as float.
// Measured in docs/kernels.md.
constexpr int64_t kMostFewSamples = 16;

// Positions of its work: a list costs its entries plus one.
template <class W>
int64_t few_samples_work(const BlockLists<W>& weight) {
  return weight.offsets[weight.lists] + weight.lists;
}

}  // namespace fastprune
