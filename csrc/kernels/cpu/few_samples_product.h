// The product of ../block_product.h for few samples and weights of 16 bits, which are widened in
// registers: it is bound by reading the weights, and these are half as many bytes.
#pragma once

#include "../block_product.h"

namespace fastprune {

// Beyond these, widening all weights once and multiplying them as float is no slower (AVX2, one
// thread, 75 % sparse: at 32 samples it takes 1.1 to 2.0 times as long, at 48 0.9 to 1.4 times;
// docs/kernels.md).
constexpr int64_t kMostFewSamples = 32;

// Positions of its work: a list costs its entries plus one.
template <class W>
int64_t few_samples_work(const BlockLists<W>& weight) {
  return weight.offsets[weight.lists] + weight.lists;
}

}  // namespace fastprune
