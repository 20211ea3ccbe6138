// One table of CPU kernels per instruction set, and the choice among them at run time.
#pragma once

#include <string>
#include <vector>

#include "../ablate_conv2d.h"
#include "../ablate_linear.h"
#include "../ablated_cross_entropy.h"
#include "../ablated_mlp_cross_entropy.h"
#include "../block_sparse_conv2d_weight_gradient.h"
#include "../block_sparse_linear_weight_gradient.h"
#include "../updated_conv2d.h"
#include "block_convolution.h"
#include "block_product.h"
#include "channels_last_convolution.h"
#include "channels_last_weight_gradient.h"
#include "few_samples_product.h"

namespace fastprune {

// Kernels of one element type. Ranges [begin, end) are positions of the work that the op's header
// describes; the kernels know nothing of threads.
template <class T>
struct CpuKernelsOf {
  // scratch: as many elements as the plan, or the op's ..._scratch, says, that no other thread
  // uses.
  BlockProductWork (*plan_block_product)(const BlockProductArgs<T>&, int64_t threads);
  void (*block_product)(const BlockProductArgs<T>&, const BlockProductWork&, int64_t begin,
                        int64_t end, T* scratch);
  BlockConvolutionWork (*plan_block_convolution)(const BlockConvolutionArgs<T>&, int64_t threads);
  void (*block_convolution)(const BlockConvolutionArgs<T>&, const BlockConvolutionWork&,
                            int64_t begin, int64_t end, T* scratch);
  // Whether this instruction set has the kernel for these images and blocks.
  bool (*serves_channels_last_convolution)(const BlockConvolutionArgs<T>&);
  ChannelsLastWork (*plan_channels_last_convolution)(const BlockConvolutionArgs<T>&,
                                                     int64_t threads);
  void (*channels_last_convolution)(const BlockConvolutionArgs<T>&, const ChannelsLastWork&,
                                    int64_t begin, int64_t end, T* scratch);
  BlockSparseLinearWeightGradientWork (*plan_weight_gradient)(
      const BlockSparseLinearWeightGradientArgs<T>&);
  void (*weight_gradient)(const BlockSparseLinearWeightGradientArgs<T>&,
                          const BlockSparseLinearWeightGradientWork&, int64_t begin, int64_t end,
                          T* scratch);
  BlockSparseConv2dWeightGradientWork (*plan_conv2d_weight_gradient)(
      const BlockSparseConv2dWeightGradientArgs<T>&);
  // Images [begin, end) of the copies that the kernel reads.
  void (*copy_conv2d_planes)(const BlockSparseConv2dWeightGradientArgs<T>&,
                             const BlockSparseConv2dWeightGradientWork&, int64_t begin, int64_t end,
                             T* planes);
  void (*conv2d_weight_gradient)(const BlockSparseConv2dWeightGradientArgs<T>&,
                                 const BlockSparseConv2dWeightGradientWork&, const T* planes,
                                 int64_t begin, int64_t end);
  bool (*serves_channels_last_weight_gradient)(const BlockSparseConv2dWeightGradientArgs<T>&);
  ChannelsLastWeightGradientWork (*plan_channels_last_weight_gradient)(
      const BlockSparseConv2dWeightGradientArgs<T>&);
  void (*channels_last_weight_gradient)(const BlockSparseConv2dWeightGradientArgs<T>&,
                                        const ChannelsLastWeightGradientWork&, int64_t begin,
                                        int64_t end, T* scratch);
  int64_t (*ablated_cross_entropy_scratch)(const AblatedCrossEntropyArgs<T>&);
  void (*ablated_cross_entropy)(const AblatedCrossEntropyArgs<T>&, int64_t begin, int64_t end,
                                T* scratch);
  int64_t (*ablated_mlp_cross_entropy_scratch)(const AblatedMlpCrossEntropyArgs<T>&);
  void (*ablated_mlp_cross_entropy)(const AblatedMlpCrossEntropyArgs<T>&, int64_t begin,
                                    int64_t end, T* scratch);
  int64_t (*ablate_linear_scratch)(const AblateLinearArgs<T>&);
  void (*ablate_linear)(const AblateLinearArgs<T>&, int64_t begin, int64_t end, T* scratch);
  int64_t (*ablate_conv2d_scratch)(const AblateConv2dArgs<T>&);
  void (*ablate_conv2d)(const AblateConv2dArgs<T>&, int64_t begin, int64_t end, T* scratch);
  UpdatedConv2dWork (*plan_updated_conv2d)(const UpdatedConv2dArgs<T>&);
  void (*updated_conv2d)(const UpdatedConv2dArgs<T>&, const UpdatedConv2dWork&, int64_t begin,
                         int64_t end, T* scratch);
};

// Of float activations and weights of a 16-bit type.
template <class W>
using FewSamplesProduct = void (*)(const MixedBlockProductArgs<float, W>&, int64_t begin,
                                   int64_t end);

struct CpuKernels {
  const char* isa;
  CpuKernelsOf<float> f32;
  CpuKernelsOf<double> f64;
  FewSamplesProduct<BFloat16> few_samples_bf16;
  FewSamplesProduct<Float16> few_samples_f16;
};

template <class T>
const CpuKernelsOf<T>& kernels_of(const CpuKernels& kernels);
template <>
inline const CpuKernelsOf<float>& kernels_of(const CpuKernels& kernels) {
  return kernels.f32;
}
template <>
inline const CpuKernelsOf<double>& kernels_of(const CpuKernels& kernels) {
  return kernels.f64;
}

template <class W>
FewSamplesProduct<W> few_samples_product_of(const CpuKernels& kernels);
template <>
inline FewSamplesProduct<BFloat16> few_samples_product_of<BFloat16>(const CpuKernels& kernels) {
  return kernels.few_samples_bf16;
}
template <>
inline FewSamplesProduct<Float16> few_samples_product_of<Float16>(const CpuKernels& kernels) {
  return kernels.few_samples_f16;
}

// The best set this CPU runs, or the one forced by FASTPRUNE_CPU_ISA or set_cpu_isa.
const CpuKernels& cpu_kernels();

// Names of the sets built in, best first; supported: those this CPU runs as well.
std::vector<std::string> built_cpu_isas();
std::vector<std::string> supported_cpu_isas();

// Forces a set by name; "" goes back to the best. Throws std::invalid_argument for a set that is
// not built in or that this CPU does not run.
void set_cpu_isa(const std::string& name);

}  // namespace fastprune
