// The kernel of few_samples_product.h. It adds the products of float32 weights in the order of
// block_product.cpp: the bits are those that widened weights give.
#include "few_samples_product.h"

#include "few_samples.h"
#include "list_grid.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {

template <class W>
void few_samples_product(const MixedBlockProductArgs<float, W>& args, int64_t begin, int64_t end) {
  const auto multiply = [&](int64_t, int64_t first, int64_t last) {
    multiply_few_samples_of_lists(args, first, last);
  };
  for_each_group(args.weight, 1, [](int64_t group) { return group; }, begin, end, multiply);
}

template void few_samples_product(const MixedBlockProductArgs<float, BFloat16>&, int64_t, int64_t);
template void few_samples_product(const MixedBlockProductArgs<float, Float16>&, int64_t, int64_t);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
