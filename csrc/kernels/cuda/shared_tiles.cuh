// Operands of the tensor cores in shared memory: tiles of 16 steps (the dimension that is summed
// over), laid out in chunks of 16 bytes that are swizzled so that neither copies nor the loads of
// fragments meet in a bank.
//
//   StepTile    [rows][16 steps]: inputs, and weights whose steps lie side by side
//   OutputTile  [16 steps][columns]: weights whose outputs lie side by side
//
// Addresses are of shared memory and offsets in bytes: both take 32 bits, half of what a pointer
// costs in the inner loop. T is __half, __nv_bfloat16, or float for tf32.
#pragma once

#include "ptx.cuh"

namespace fastprune {

constexpr int kSlotSteps = 16;

template <class T>
constexpr int kChunkElements = 16 / sizeof(T);

// Multiplications of one slot: 16 steps each for 16-bit types, 8 for tf32.
template <class T>
constexpr int kSlotProducts = kSlotSteps * sizeof(T) / 32;

template <class T>
struct StepTile {
  static constexpr int kChunks = kSlotSteps / kChunkElements<T>;  // of a row
  static constexpr int kLineRows = 8 / kChunks;                   // rows of all 32 banks
  static constexpr int kRowBytes = 16 * kChunks;

  // Where `chunk` of `row` begins: eight neighbouring rows lie in different banks. Rows a multiple
  // of 8 apart are swizzled alike.
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row / kLineRows % kChunks)) * 16;
  }
};

template <class T, int kColumns>
struct OutputTile {
  static constexpr int kChunks = kColumns / kChunkElements<T>;  // of a step
  static constexpr int kLineSteps = kChunks < 8 ? 8 / kChunks : 1;
  static constexpr int kStepBytes = 16 * kChunks;
  static constexpr int kSwizzled = kChunks < 8 ? kColumns : 8 * kChunkElements<T>;  // outputs

  // Steps 8 apart are swizzled alike. For ldmatrix eight steps lie in different banks; tf32 is read
  // in pairs g of steps t, for which four steps lie in different pairs of chunks.
  static __device__ __forceinline__ uint32_t offset(int step, int chunk) {
    const int line = step / kLineSteps;
    const int swizzle =
        sizeof(T) == 2 ? line % (kChunks < 8 ? kChunks : 8) : line % (kChunks < 8 ? 2 : 4) * 2;
    return step * kStepBytes + (chunk ^ swizzle) * 16;
  }
};

// Carries the first `valid` elements of a chunk that is not aligned to 16 bytes, zeros after them.
template <class T>
__device__ __forceinline__ void carry_chunk(uint32_t shared, const T* global, int valid) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = i < valid ? reinterpret_cast<const uint32_t*>(global)[i] : 0;
    } else {
      const auto* elements = reinterpret_cast<const uint16_t*>(global);
      const uint32_t low = 2 * i < valid ? elements[2 * i] : 0;
      const uint32_t high = 2 * i + 1 < valid ? elements[2 * i + 1] : 0;
      words[i] = low | high << 16;
    }
  }
  store_four(shared, words);
}

// How many elements of a chunk lie before `end`, counted from the chunk's first element.
template <class T>
__device__ __forceinline__ int valid_in_chunk(int end) {
  return max(0, min(end, kChunkElements<T>));
}

template <class T>
__device__ __forceinline__ void round_operand(uint32_t (&fragment)[4]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (uint32_t& element : fragment) element = round_to_tf32(__uint_as_float(element));
  }
}

// Where a lane finds, in a StepTile, its part of the left operand of product `product` of a slot,
// of rows 0 to 15; of those from row r on, r * kRowBytes further.
template <class T>
__device__ __forceinline__ uint32_t rows_offset(int product, int lane) {
  return StepTile<T>::offset(lane % 16, 2 * product + lane / 16);
}

// The same of the right operands of outputs 0 to 15, two of 8 one after the other.
template <class T>
__device__ __forceinline__ uint32_t step_outputs_offset(int product, int lane) {
  return StepTile<T>::offset(lane / 16 * 8 + lane % 8, 2 * product + lane / 8 % 2);
}

// The same in an OutputTile, of outputs `output` to `output` + 15. The swizzle repeats after
// kSwizzled outputs.
template <class T, int kColumns>
__device__ __forceinline__ uint32_t outputs_offset(int output, int lane) {
  using Tile = OutputTile<T, kColumns>;
  if constexpr (sizeof(T) == 2) return Tile::offset(lane % 16, output / 8 + lane / 16);
  const int g = lane / 4, t = lane % 4;
  return Tile::offset(t, output / 4 + g / 2) + g % 2 * 8;
}

template <class T>
__device__ __forceinline__ void load_operand(uint32_t (&fragment)[4], uint32_t address) {
  load_matrices(fragment, address);
  round_operand<T>(fragment);
}

// The right operands of 16 outputs from an OutputTile. tf32, which ldmatrix cannot transpose, is
// read in pairs: the first of the two operands has the even outputs, the second the odd ones
// (kOddsApart).
template <class T, int kColumns>
__device__ __forceinline__ void load_outputs(uint32_t (&fragment)[4], uint32_t address,
                                             int product) {
  if constexpr (sizeof(T) == 2) {
    load_matrices_transposed(fragment, address);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_pair(fragment[i], fragment[i + 2],
                address + (8 * product + 4 * i) * OutputTile<T, kColumns>::kStepBytes);
    }
    round_operand<T>(fragment);
  }
}

// sums += rows @ outputs, of 16 rows and 16 outputs.
template <class T>
__device__ __forceinline__ void multiply_add_pair(float (&low)[4], float (&high)[4],
                                                  const uint32_t (&rows)[4],
                                                  const uint32_t (&outputs)[4]) {
  const uint32_t first[2] = {outputs[0], outputs[1]}, second[2] = {outputs[2], outputs[3]};
  multiply_add<T>(low, rows, first);
  multiply_add<T>(high, rows, second);
}

// Whether the outputs of a pair of products are the even and the odd ones, rather than 8 and 8.
template <class T, bool kStepsTogether>
constexpr bool kOddsApart = sizeof(T) == 4 && !kStepsTogether;

// Writes sums of 16 rows and 16 outputs as a matrix of floats. Without bank conflicts where 8 rows
// of pairs (kOddsApart: 2 rows of fours) lie in different banks.
template <bool kOddsApart>
__device__ __forceinline__ void write_sums(float* matrix, int row_stride, const float (&low)[4],
                                           const float (&high)[4], int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* row = matrix + (g + 8 * i) * row_stride;
    if constexpr (kOddsApart) {
      reinterpret_cast<float4*>(row)[t] =
          make_float4(low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]);
    } else {
      reinterpret_cast<float2*>(row)[t] = make_float2(low[2 * i], low[2 * i + 1]);
      reinterpret_cast<float2*>(row)[t + 4] = make_float2(high[2 * i], high[2 * i + 1]);
    }
  }
}

}  // namespace fastprune
