// Transposes a matrix through registers: dst[c][r] = src[r][c].
//
// A square of L x L elements takes log2(L) rounds of the perfect shuffle: each round interleaves
// row i with row i + L/2. What does not fill a square of full vectors takes smaller ones.
#pragma once

#include <utility>

#include "vec.h"

namespace fastprune {
namespace {

// Elements `First`, `First` + 1, ... of a and b in turn.
template <class T, int L, int First, int... I>
inline Vec<T, L> interleave(Vec<T, L> a, Vec<T, L> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (First + I / 2 + I % 2 * L)...);
#else
  return __builtin_shuffle(a, b, Vec<IntOf<T>, L>{(First + I / 2 + I % 2 * L)...});
#endif
}

// kStream: dst is written past the caches.
template <class T, int L, bool kStream>
inline void transpose_registers(Vec<T, L> (&rows)[L], T* dst, int64_t dst_stride) {
  using Lanes = std::make_integer_sequence<int, L>;
  Vec<T, L> shuffled[L];
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      shuffled[2 * i] = interleave<T, L, 0>(rows[i], rows[i + L / 2], Lanes{});
      shuffled[2 * i + 1] = interleave<T, L, L / 2>(rows[i], rows[i + L / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = shuffled[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if constexpr (kStream) {
      stream(dst + i * dst_stride, rows[i]);
    } else {
      store(dst + i * dst_stride, rows[i]);
    }
  }
}

template <class T, int L, bool kStream = false>
inline void transpose_square(const T* src, int64_t src_stride, T* dst, int64_t dst_stride) {
  Vec<T, L> rows[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) rows[i] = load<Vec<T, L>>(src + i * src_stride);
  transpose_registers<T, L, kStream>(rows, dst, dst_stride);
}

// The square whose rows past the first `count` are zeros, and need not exist.
template <class T, int L>
inline void transpose_first_rows(const T* src, int64_t src_stride, int64_t count, T* dst,
                                 int64_t dst_stride) {
  static constexpr T kZeros[L] = {};
  Vec<T, L> rows[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) rows[i] = load<Vec<T, L>>(i < count ? src + i * src_stride : kZeros);
  transpose_registers<T, L, false>(rows, dst, dst_stride);
}

// kFromMemory: src is not in the first-level cache, and is fetched 512 bytes ahead. The hardware
// follows fewer rows than a square has (768 features, 1920 samples: 0.25 for 0.32 ns an element).
template <class T, bool kFromMemory = false, int L = kLanes<T>>
void transpose(const T* src, int64_t src_stride, int64_t rows, int64_t cols, T* dst,
               int64_t dst_stride) {
  if constexpr (L == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
    }
  } else {
    const int64_t full_rows = rows - rows % L, full_cols = cols - cols % L;
    // Along the rows first, so that a cache line is used up before others of its set come in.
    for (int64_t r = 0; r < full_rows; r += L) {
      for (int64_t c = 0; c < full_cols; c += L) {
        if constexpr (kFromMemory) {
          constexpr int64_t kAhead = 512 / sizeof(T);
          for (int i = 0; i < L; ++i) __builtin_prefetch(src + (r + i) * src_stride + c + kAhead);
        }
        transpose_square<T, L>(src + r * src_stride + c, src_stride, dst + c * dst_stride + r,
                               dst_stride);
      }
    }
    if (full_cols < cols && full_rows > 0) {
      transpose<T, kFromMemory, L / 2>(src + full_cols, src_stride, full_rows, cols - full_cols,
                                       dst + full_cols * dst_stride, dst_stride);
    }
    if (full_rows < rows) {
      transpose<T, kFromMemory, L / 2>(src + full_rows * src_stride, src_stride, rows - full_rows,
                                       cols, dst + full_rows, dst_stride);
    }
  }
}

}  // namespace
}  // namespace fastprune
