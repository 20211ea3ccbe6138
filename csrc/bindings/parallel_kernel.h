// Runs a CPU kernel on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

namespace fastprune {

// Waking another thread costs some microseconds, about this many multiply-adds.
constexpr int64_t kWorthAThread = 200'000;

// Calls kernel(begin, end, scratch) for ranges that cover [0, total), each with scratch of its own.
// A range is worth at least kWorthAThread of `multiply_adds`, those of all positions together.
template <class T, class Kernel>
void parallel_kernel(int64_t total, int64_t multiply_adds, int64_t scratch_size,
                     const Kernel& kernel) {
  if (total == 0) return;
  const int64_t grain =
      multiply_adds > kWorthAThread ? (total - 1) / (multiply_adds / kWorthAThread) + 1 : total;
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    // Kept between calls: fresh pages cost more than the work on them.
    thread_local std::vector<T> scratch;
    constexpr int64_t kLine = 64 / sizeof(T);
    if (scratch.size() < static_cast<size_t>(scratch_size + kLine)) {
      scratch.resize(scratch_size + kLine);
    }
    // Vectors that straddle two cache lines take two loads.
    const auto address = reinterpret_cast<uintptr_t>(scratch.data());
    kernel(begin, end, scratch.data() + (64 - address % 64) % 64 / sizeof(T));
  });
}

}  // namespace fastprune
