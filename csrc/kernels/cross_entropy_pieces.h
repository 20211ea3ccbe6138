// What ablated_cross_entropy and ablated_mlp_cross_entropy share of their work: a grid of
// [span of samples][piece], pieces innermost. A span is a whole number of chunks, whose sums are
// added in order; how samples are divided depends on the sizes alone, and so do the bits.
#pragma once

#include <cstdint>

namespace fastprune {

// Short enough that a chunk's inputs, transposed, stay in the second-level cache (784 features of
// float: 602 KB), long enough to use a piece's weights often. A multiple of three vectors of any
// instruction set and type.
constexpr int64_t kSamplesPerChunk = 192;

// A sum for each chunk and piece would take more memory than the inputs where pieces are many.
constexpr int64_t kLargestGrid = int64_t{1} << 20;

// Both sizes are above 0.
inline int64_t samples_per_span(int64_t samples, int64_t num_pieces) {
  const int64_t chunks = (samples + kSamplesPerChunk - 1) / kSamplesPerChunk;
  const int64_t most_spans = num_pieces < kLargestGrid ? kLargestGrid / num_pieces : 1;
  return (chunks + most_spans - 1) / most_spans * kSamplesPerChunk;
}

}  // namespace fastprune
