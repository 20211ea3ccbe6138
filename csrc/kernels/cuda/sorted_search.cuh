// Searches in the sorted columns of a block row.
#pragma once

#include <cstdint>

namespace fastprune {

// The first entry of [begin, end) whose column is at least `column`.
__device__ __forceinline__ int32_t lower_bound(const int32_t* columns, int32_t begin, int32_t end,
                                               int32_t column) {
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (columns[middle] < column) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

}  // namespace fastprune
