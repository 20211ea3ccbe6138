// The structure of a block-sparse matrix by its block columns, for products with its transpose.
#pragma once

#include <cstdint>
#include <vector>

namespace fastprune {

// The kept blocks by block column: entry j of column c, offsets[c] <= j < offsets[c + 1], is block
// blocks[j], of block row sources[j]. Within a column they are in the order of the block rows.
struct TransposedStructure {
  std::vector<int32_t> offsets, sources, blocks;
};

inline TransposedStructure transpose_structure(const int32_t* crow, const int32_t* col,
                                               int64_t block_rows, int64_t block_cols) {
  const int64_t kept = crow[block_rows];
  TransposedStructure result;
  result.offsets.assign(block_cols + 1, 0);
  result.sources.resize(kept);
  result.blocks.resize(kept);
  for (int64_t k = 0; k < kept; ++k) ++result.offsets[col[k] + 1];
  for (int64_t c = 0; c < block_cols; ++c) result.offsets[c + 1] += result.offsets[c];
  std::vector<int32_t> next(result.offsets.begin(), result.offsets.end() - 1);
  for (int64_t row = 0; row < block_rows; ++row) {
    for (int32_t k = crow[row]; k < crow[row + 1]; ++k) {
      const int32_t j = next[col[k]]++;
      result.sources[j] = static_cast<int32_t>(row);
      result.blocks[j] = k;
    }
  }
  return result;
}

// The same for the input gradient of a convolution: list g * channel_blocks + c holds the kept
// blocks of block c of group g's input channels, in the taps that have a rank (not -1); sources[j]
// is rank * (block rows of a group) + block row within the group.
inline TransposedStructure transpose_convolution(const int32_t* crow, const int32_t* col,
                                                 int64_t block_rows, int64_t channel_blocks,
                                                 int64_t groups,
                                                 const std::vector<int32_t>& tap_ranks) {
  const int64_t rows_per_group = block_rows / groups;
  TransposedStructure result;
  result.offsets.assign(groups * channel_blocks + 1, 0);
  const auto for_each_block = [&](const auto& visit) {
    for (int64_t row = 0; row < block_rows; ++row) {
      for (int32_t k = crow[row]; k < crow[row + 1]; ++k) {
        const int32_t rank = tap_ranks[col[k] / channel_blocks];
        if (rank < 0) continue;
        visit(row / rows_per_group * channel_blocks + col[k] % channel_blocks,
              rank * rows_per_group + row % rows_per_group, k);
      }
    }
  };
  for_each_block([&](int64_t list, int64_t, int32_t) { ++result.offsets[list + 1]; });
  for (int64_t list = 0; list < groups * channel_blocks; ++list) {
    result.offsets[list + 1] += result.offsets[list];
  }
  result.sources.resize(result.offsets.back());
  result.blocks.resize(result.offsets.back());
  std::vector<int32_t> next(result.offsets.begin(), result.offsets.end() - 1);
  for_each_block([&](int64_t list, int64_t source, int32_t k) {
    const int32_t j = next[list]++;
    result.sources[j] = static_cast<int32_t>(source);
    result.blocks[j] = k;
  });
  return result;
}

}  // namespace fastprune
