// Loads of stored weights as the vectors that are multiplied. 16-bit numbers become float, which
// loses nothing: infinities and NaN stay what they are, and so do denormal float16, also where the
// CPU takes denormal float for zero.
#pragma once

#include "../types.h"
#include "vec.h"

namespace fastprune {
namespace {

// Zeros in front of each number. GCC 12 takes three instructions where there is one.
template <int Lanes>
inline Vec<uint32_t, Lanes> extend(Vec<uint16_t, Lanes> bits) {
  using Int = Vec<uint32_t, Lanes>;
#if defined(__AVX512F__)
  if constexpr (Lanes == 16) return bit_cast<Int>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)));
#endif
#if defined(__AVX2__)
  if constexpr (Lanes == 8) return bit_cast<Int>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#endif
  return __builtin_convertvector(bits, Int);
}

template <int Lanes>
inline Vec<float, Lanes> widen_bfloat16(Vec<uint16_t, Lanes> bits) {
  return bit_cast<Vec<float, Lanes>>(extend<Lanes>(bits) << 16);
}

template <int Lanes>
inline Vec<float, Lanes> widen_float16(Vec<uint16_t, Lanes> bits) {
  using Float = Vec<float, Lanes>;
#if defined(__AVX512F__)
  if constexpr (Lanes == 16) return bit_cast<Float>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#endif
#if defined(__F16C__)
  if constexpr (Lanes == 8) {
    return bit_cast<Float>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
  } else if constexpr (Lanes < 8) {
    __m128i padded = _mm_setzero_si128();
    __builtin_memcpy(&padded, &bits, sizeof(bits));
    const __m128 widened = _mm_cvtph_ps(padded);
    Float result;
    __builtin_memcpy(&result, &widened, sizeof(result));
    return result;
  }
#else
  using Int = Vec<uint32_t, Lanes>;
  const Int all = extend<Lanes>(bits);
  const Int magnitude = all & 0x7fff, exponent = all & 0x7c00;
  // The exponent's bias is 15 here and 127 there; all ones, 31 and 255, are infinities and NaN.
  const Int normal = (magnitude << 13) + ((127 - 15) << 23);
  const Int not_finite = (magnitude << 13) + ((255 - 31) << 23);
  const auto count = bit_cast<Vec<int32_t, Lanes>>(magnitude);
  const Int denormal = bit_cast<Int>(__builtin_convertvector(count, Float) * 0x1p-24f);
  const Int finite = exponent == 0 ? denormal : normal;
  const Int unsigned_bits = exponent == 0x7c00 ? not_finite : finite;
  return bit_cast<Float>(unsigned_bits | ((all & 0x8000) << 16));
#endif
}

// A vector of what is stored at `source`.
template <class V, class W>
inline V load_widened(const W* source) {
  if constexpr (std::is_same_v<W, BFloat16>) {
    constexpr int kCount = sizeof(V) / sizeof(float);
    return widen_bfloat16<kCount>(load<Vec<uint16_t, kCount>>(source));
  } else if constexpr (std::is_same_v<W, Float16>) {
    constexpr int kCount = sizeof(V) / sizeof(float);
    return widen_float16<kCount>(load<Vec<uint16_t, kCount>>(source));
  } else {
    return load<V>(source);
  }
}

}  // namespace
}  // namespace fastprune
