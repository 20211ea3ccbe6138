#include "dispatch.h"

#if FASTPRUNE_X86_KERNELS
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastprune {

// Each kernel file is compiled once per instruction set, into a namespace of that name.
#define FASTPRUNE_DECLARE_KERNELS(isa)                                                             \
  namespace isa {                                                                                  \
  template <class T>                                                                               \
  BlockProductWork plan_block_product(const BlockProductArgs<T>&, int64_t);                        \
  template <class T>                                                                               \
  void block_product(const BlockProductArgs<T>&, const BlockProductWork&, int64_t, int64_t, T*);   \
  template <class T>                                                                               \
  BlockConvolutionWork plan_block_convolution(const BlockConvolutionArgs<T>&, int64_t);            \
  template <class T>                                                                               \
  void block_convolution(const BlockConvolutionArgs<T>&, const BlockConvolutionWork&, int64_t,     \
                         int64_t, T*);                                                             \
  template <class T>                                                                               \
  bool serves_channels_last_convolution(const BlockConvolutionArgs<T>&);                           \
  template <class T>                                                                               \
  ChannelsLastWork plan_channels_last_convolution(const BlockConvolutionArgs<T>&, int64_t);        \
  template <class T>                                                                               \
  void channels_last_convolution(const BlockConvolutionArgs<T>&, const ChannelsLastWork&, int64_t, \
                                 int64_t, T*);                                                     \
  template <class T>                                                                               \
  BlockSparseLinearWeightGradientWork plan_block_sparse_linear_weight_gradient(                    \
      const BlockSparseLinearWeightGradientArgs<T>&);                                              \
  template <class T>                                                                               \
  void block_sparse_linear_weight_gradient(const BlockSparseLinearWeightGradientArgs<T>&,          \
                                           const BlockSparseLinearWeightGradientWork&, int64_t,    \
                                           int64_t, T*);                                           \
  template <class T>                                                                               \
  BlockSparseConv2dWeightGradientWork plan_block_sparse_conv2d_weight_gradient(                    \
      const BlockSparseConv2dWeightGradientArgs<T>&);                                              \
  template <class T>                                                                               \
  void copy_conv2d_planes(const BlockSparseConv2dWeightGradientArgs<T>&,                           \
                          const BlockSparseConv2dWeightGradientWork&, int64_t, int64_t, T*);       \
  template <class T>                                                                               \
  void block_sparse_conv2d_weight_gradient(const BlockSparseConv2dWeightGradientArgs<T>&,          \
                                           const BlockSparseConv2dWeightGradientWork&, const T*,   \
                                           int64_t, int64_t);                                      \
  template <class T>                                                                               \
  bool serves_channels_last_weight_gradient(const BlockSparseConv2dWeightGradientArgs<T>&);        \
  template <class T>                                                                               \
  ChannelsLastWeightGradientWork plan_channels_last_weight_gradient(                               \
      const BlockSparseConv2dWeightGradientArgs<T>&);                                              \
  template <class T>                                                                               \
  void channels_last_weight_gradient(const BlockSparseConv2dWeightGradientArgs<T>&,                \
                                     const ChannelsLastWeightGradientWork&, int64_t, int64_t, T*); \
  template <class T>                                                                               \
  int64_t ablated_cross_entropy_scratch(const AblatedCrossEntropyArgs<T>&);                        \
  template <class T>                                                                               \
  void ablated_cross_entropy(const AblatedCrossEntropyArgs<T>&, int64_t, int64_t, T*);             \
  template <class T>                                                                               \
  int64_t ablated_mlp_cross_entropy_scratch(const AblatedMlpCrossEntropyArgs<T>&);                 \
  template <class T>                                                                               \
  void ablated_mlp_cross_entropy(const AblatedMlpCrossEntropyArgs<T>&, int64_t, int64_t, T*);      \
  template <class T>                                                                               \
  int64_t ablate_linear_scratch(const AblateLinearArgs<T>&);                                       \
  template <class T>                                                                               \
  void ablate_linear(const AblateLinearArgs<T>&, int64_t, int64_t, T*);                            \
  template <class T>                                                                               \
  int64_t ablate_conv2d_scratch(const AblateConv2dArgs<T>&);                                       \
  template <class T>                                                                               \
  void ablate_conv2d(const AblateConv2dArgs<T>&, int64_t, int64_t, T*);                            \
  template <class T>                                                                               \
  UpdatedConv2dWork plan_updated_conv2d(const UpdatedConv2dArgs<T>&);                              \
  template <class T>                                                                               \
  void updated_conv2d(const UpdatedConv2dArgs<T>&, const UpdatedConv2dWork&, int64_t, int64_t,     \
                      T*);                                                                         \
  template <class W>                                                                               \
  void few_samples_product(const MixedBlockProductArgs<float, W>&, int64_t, int64_t);              \
  template <class T>                                                                               \
  constexpr CpuKernelsOf<T> kTable = {plan_block_product<T>,                                       \
                                      block_product<T>,                                            \
                                      plan_block_convolution<T>,                                   \
                                      block_convolution<T>,                                        \
                                      serves_channels_last_convolution<T>,                         \
                                      plan_channels_last_convolution<T>,                           \
                                      channels_last_convolution<T>,                                \
                                      plan_block_sparse_linear_weight_gradient<T>,                 \
                                      block_sparse_linear_weight_gradient<T>,                      \
                                      plan_block_sparse_conv2d_weight_gradient<T>,                 \
                                      copy_conv2d_planes<T>,                                       \
                                      block_sparse_conv2d_weight_gradient<T>,                      \
                                      serves_channels_last_weight_gradient<T>,                     \
                                      plan_channels_last_weight_gradient<T>,                       \
                                      channels_last_weight_gradient<T>,                            \
                                      ablated_cross_entropy_scratch<T>,                            \
                                      ablated_cross_entropy<T>,                                    \
                                      ablated_mlp_cross_entropy_scratch<T>,                        \
                                      ablated_mlp_cross_entropy<T>,                                \
                                      ablate_linear_scratch<T>,                                    \
                                      ablate_linear<T>,                                            \
                                      ablate_conv2d_scratch<T>,                                    \
                                      ablate_conv2d<T>,                                            \
                                      plan_updated_conv2d<T>,                                      \
                                      updated_conv2d<T>};                                          \
  constexpr CpuKernels kernels(const char* name) {                                                 \
    return {name, kTable<float>, kTable<double>, few_samples_product<BFloat16>,                    \
            few_samples_product<Float16>};                                                         \
  }                                                                                                \
  }

FASTPRUNE_DECLARE_KERNELS(baseline)
#if FASTPRUNE_X86_KERNELS
FASTPRUNE_DECLARE_KERNELS(avx2)
FASTPRUNE_DECLARE_KERNELS(avx512)
#endif

namespace {

struct Entry {
  CpuKernels kernels;
  bool (*supported)();
};

#if FASTPRUNE_X86_KERNELS
// Conversions of float16; not every compiler's __builtin_cpu_supports knows of it.
bool supports_f16c() {
  unsigned int a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool supports_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
}
#endif

const Entry kEntries[] = {
#if FASTPRUNE_X86_KERNELS
    {avx512::kernels("avx512"),
     [] {
       return supports_avx2() && __builtin_cpu_supports("avx512f") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl");
     }},
    {avx2::kernels("avx2"), supports_avx2},
#endif
    {baseline::kernels("baseline"), [] { return true; }},
};

std::string join(const std::vector<std::string>& names) {
  std::string result;
  for (const auto& name : names) result += (result.empty() ? "" : ", ") + name;
  return result;
}

const CpuKernels& choose(const std::string& name) {
  for (const Entry& entry : kEntries) {
    if ((name.empty() || name == entry.kernels.isa) && entry.supported()) return entry.kernels;
  }
  throw std::invalid_argument(
      "fastprune: instruction set '" + name +
      "' is not available; this build on this CPU has: " + join(supported_cpu_isas()));
}

std::atomic<const CpuKernels*> active{nullptr};

}  // namespace

const CpuKernels& cpu_kernels() {
  const CpuKernels* kernels = active.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    const char* forced = std::getenv("FASTPRUNE_CPU_ISA");
    try {
      kernels = &choose(forced ? forced : "");
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string(error.what()) + " (set by FASTPRUNE_CPU_ISA)");
    }
    active.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

std::vector<std::string> built_cpu_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) names.emplace_back(entry.kernels.isa);
  return names;
}

std::vector<std::string> supported_cpu_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) {
    if (entry.supported()) names.emplace_back(entry.kernels.isa);
  }
  return names;
}

void set_cpu_isa(const std::string& name) {
  active.store(&choose(name), std::memory_order_release);
}

}  // namespace fastprune
