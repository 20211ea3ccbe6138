// The grid of (group of units, list of blocks), walked group by group. A list costs its entries
// plus one for each unit, so that equal ranges of positions are equal work whatever the pattern.
#pragma once

#include "block_product.h"

namespace fastprune {
namespace {

// The first list that starts at or after position `cost` of one unit.
template <class T>
int64_t first_list_from(const BlockLists<T>& weight, int64_t cost) {
  int64_t low = 0, high = weight.lists;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (weight.offsets[middle] + middle < cost) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
int64_t cost_per_unit(const BlockLists<T>& weight) {
  return weight.offsets[weight.lists] + weight.lists;
}

// Calls part(group, first_list, last_list) for what positions [begin, end) hold of each group;
// group g has units [first_unit(g), first_unit(g + 1)).
template <class T, class FirstUnit, class Part>
void for_each_group(const BlockLists<T>& weight, int64_t groups, const FirstUnit& first_unit,
                    int64_t begin, int64_t end, const Part& part) {
  const int64_t cost = cost_per_unit(weight);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t width = first_unit(group + 1) - first_unit(group);
    // The part of [begin, end) in this group, in positions of one unit.
    const int64_t group_begin = begin - first_unit(group) * cost;
    const int64_t group_end = end - first_unit(group) * cost;
    if (group_end <= 0) break;
    if (group_begin >= width * cost) continue;
    // Rounded up at both ends, so that ranges that meet neither overlap nor leave a gap.
    const int64_t first =
        group_begin > 0 ? first_list_from(weight, (group_begin + width - 1) / width) : 0;
    const int64_t last = group_end < width * cost
                             ? first_list_from(weight, (group_end + width - 1) / width)
                             : weight.lists;
    if (first < last) part(group, first, last);
  }
}

}  // namespace
}  // namespace fastprune
