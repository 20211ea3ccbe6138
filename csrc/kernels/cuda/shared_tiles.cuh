// Operands of the tensor cores in shared memory: tiles of 16 steps (the dimension that is summed
// over), laid out in chunks of 16 bytes that are swizzled so that neither copies nor the loads of
// fragments meet in a bank.
//
//   StepTile    [rows][16 steps]: inputs, and weights whose steps lie side by side
//   OutputTile  [16 steps][columns]: weights whose outputs lie side by side
//
// T is __half, __nv_bfloat16, or float for tf32.
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

  // Of an element, where `chunk` of `row` begins: eight neighbouring rows lie in different banks.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return (row * kChunks + (chunk ^ (row / kLineRows % kChunks))) * kChunkElements<T>;
  }
};

template <class T, int kColumns>
struct OutputTile {
  static constexpr int kChunks = kColumns / kChunkElements<T>;  // of a step
  static constexpr int kLineSteps = kChunks < 8 ? 8 / kChunks : 1;

  // For ldmatrix eight steps lie in different banks; tf32 is read in pairs g of steps t, for which
  // four steps lie in different pairs of chunks.
  static __device__ __forceinline__ int offset(int step, int chunk) {
    const int line = step / kLineSteps;
    const int swizzle =
        sizeof(T) == 2 ? line % (kChunks < 8 ? kChunks : 8) : line % (kChunks < 8 ? 2 : 4) * 2;
    return (step * kChunks + (chunk ^ swizzle)) * kChunkElements<T>;
  }
};

// Copies the first `valid` elements of a chunk, zeros after them. Where the source is not aligned
// to 16 bytes the thread itself carries the elements.
template <class T>
__device__ __forceinline__ void copy_chunk(T* shared, const T* global, int valid, bool aligned) {
  if (aligned) {
    copy_async<16>(shared, global, valid * static_cast<int>(sizeof(T)));
    return;
  }
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
  *reinterpret_cast<uint4*>(shared) = make_uint4(words[0], words[1], words[2], words[3]);
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

// The left operand of product `product` of a slot: rows `row` to `row` + 15 of a StepTile.
template <class T>
__device__ __forceinline__ void load_rows(uint32_t (&fragment)[4], const T* tile, int row,
                                          int product, int lane) {
  load_matrices(fragment, tile + StepTile<T>::offset(row + lane % 16, 2 * product + lane / 16));
  round_operand<T>(fragment);
}

// The right operands of 16 outputs, two of 8 one after the other, from a StepTile.
template <class T>
__device__ __forceinline__ void load_step_outputs(uint32_t (&fragment)[4], const T* tile,
                                                  int output, int product, int lane) {
  const int row = output + lane / 16 * 8 + lane % 8;
  load_matrices(fragment, tile + StepTile<T>::offset(row, 2 * product + lane / 8 % 2));
  round_operand<T>(fragment);
}

// The same from an OutputTile. tf32, which ldmatrix cannot transpose, is read in pairs: the first
// of the two operands has the even outputs, the second the odd ones (kOddsApart).
template <class T, int kColumns>
__device__ __forceinline__ void load_outputs(uint32_t (&fragment)[4], const T* tile, int output,
                                             int product, int lane) {
  using Tile = OutputTile<T, kColumns>;
  if constexpr (sizeof(T) == 2) {
    load_matrices_transposed(
        fragment, tile + Tile::offset(lane % 16, output / kChunkElements<T> + lane / 16));
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int step = 8 * product + 4 * i + t;
      const float2 pair = *reinterpret_cast<const float2*>(
          tile + Tile::offset(step, output / 4 + g / 2) + g % 2 * 2);
      fragment[i] = __float_as_uint(pair.x);
      fragment[i + 2] = __float_as_uint(pair.y);
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
