// What a launcher hands to CUDA. Plain C++, without CUDA's headers: `_C` shows the plans to the
// tests, which run each kernel's PTX with the very geometry that its launcher uses.
#pragma once

#include <cstdint>

namespace fastprune {

struct LaunchPlan {
  const char* kernel;
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;  // dynamic shared memory, beside what the kernel declares
};

// Of gridDim.x; y and z end at 65,535, too few for one thread block per output tile.
constexpr int64_t kMaxGridX = 2147483647;

}  // namespace fastprune
