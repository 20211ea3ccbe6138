// The check of a block-sparse matrix's indices on the CPU.
#pragma once

#include <cstdint>

#include "tensor_checks.h"

namespace fastprune {

// The indices may come from a file: nothing is read through them before this.
inline void check_structure(const char* op, const int32_t* crow, const int32_t* col,
                            int64_t block_rows, int64_t block_cols, int64_t kept) {
  if (crow[0] != 0 || crow[block_rows] != kept) {
    throw_value_error(op, ": `crow_indices` must begin with 0 and end with ", kept,
                      ", the number of blocks, got ", crow[0], " and ", crow[block_rows]);
  }
  for (int64_t row = 0; row < block_rows; ++row) {
    if (crow[row] > crow[row + 1] || crow[row + 1] > kept) {
      throw_value_error(op, ": `crow_indices` must not decrease, got ", crow[row], " then ",
                        crow[row + 1], " at block row ", row);
    }
    const int64_t begin = crow[row], end = crow[row + 1];
    if (begin == end) continue;
    // Without branches, so that the compiler makes vectors of it; the loop below finds the place.
    bool wrong = col[begin] < 0 || col[end - 1] >= block_cols;
    for (int64_t k = begin + 1; k < end; ++k) wrong |= col[k] <= col[k - 1];
    if (!wrong) continue;
    int64_t previous = -1;
    for (int64_t k = begin; k < end; ++k) {
      if (col[k] <= previous || col[k] >= block_cols) {
        throw_value_error(op, ": `col_indices` must increase within a block row and lie in [0, ",
                          block_cols, "), got ", col[k], " after ", previous, " in block row ",
                          row);
      }
      previous = col[k];
    }
  }
}

}  // namespace fastprune
