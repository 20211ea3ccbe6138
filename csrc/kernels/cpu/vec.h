// Vectors of T with a compile-time number of lanes, and the elementwise functions the kernels
// need. Written with the vector extension of GCC and Clang, so one source serves every
// instruction set: each kernel file is compiled once per set, and the compiler picks the
// instructions. All is in an anonymous namespace, so no AVX code is shared with another file.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__AVX512F__)
#define FASTPRUNE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTPRUNE_VECTOR_BYTES 32
#else
#define FASTPRUNE_VECTOR_BYTES 16
#endif

namespace fastprune {
namespace {

template <class T, int Lanes>
struct VecOf {
  typedef T type __attribute__((vector_size(Lanes * sizeof(T))));
};
template <class T, int Lanes>
using Vec = typename VecOf<T, Lanes>::type;

// The integer of T's size, as shuffles and bit patterns need it.
template <class T>
using IntOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T>
constexpr int kLanes = FASTPRUNE_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class V, class T>
inline V load(const T* source) {
  V result;
  __builtin_memcpy(&result, source, sizeof(V));
  return result;
}

template <class V, class T>
inline void store(T* target, V value) {
  __builtin_memcpy(target, &value, sizeof(V));
}

// The same bits as another type of the same size.
template <class To, class From>
inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

// Stores past the caches, to a multiple of the vector's size; the stores that make up a cache line
// should follow each other. stream_fence() makes them visible to other threads.
#if defined(__AVX__)
constexpr bool kCanStream = true;
template <class T, class V>
inline void stream(T* target, V value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(target), bit_cast<__m512i>(value));
#else
  _mm256_stream_si256(reinterpret_cast<__m256i*>(target), bit_cast<__m256i>(value));
#endif
}
inline void stream_fence() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
template <class T, class V>
inline void stream(T* target, V value) {
  store(target, value);
}
inline void stream_fence() {}
#endif

template <class V, class T>
inline V broadcast(T value) {
  return value - V{};
}

template <class V>
inline V maximum(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline V minimum(V a, V b) {
  return a < b ? a : b;
}

// Whether a comparison holds in every lane.
template <class V>
inline bool all_lanes(V mask) {
#if defined(__AVX512F__)
  static_assert(sizeof(V) == 64);
  return _mm512_cmpneq_epi64_mask(bit_cast<__m512i>(mask), _mm512_set1_epi64(-1)) == 0;
#elif defined(__AVX2__)
  static_assert(sizeof(V) == 32);
  return _mm256_movemask_epi8(bit_cast<__m256i>(mask)) == -1;
#else
  using Words = Vec<int64_t, static_cast<int>(sizeof(V)) / 8>;
  const Words words = bit_cast<Words>(mask);
  int64_t all = -1;
  for (int i = 0; i < static_cast<int>(sizeof(V)) / 8; ++i) all &= words[i];
  return all == -1;
#endif
}

// Which lanes of a vector of T are read. A load through it gives zeros in the others, where memory
// need not exist.
#if defined(__AVX512F__)
template <class T>
using LaneMask = uint16_t;
#else
template <class T>
using LaneMask = Vec<IntOf<T>, kLanes<T>>;
#endif

// The mask of the first `count` lanes: none below 1, all from the number of lanes on.
template <class T>
inline LaneMask<T> first_lanes(int64_t count) {
#if defined(__AVX512F__)
  return static_cast<uint16_t>(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0);
#else
  Vec<IntOf<T>, kLanes<T>> lanes;
  for (int lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = lane;
  const int64_t within = count < 0 ? 0 : count > kLanes<T> ? kLanes<T> : count;
  return lanes < static_cast<IntOf<T>>(within);
#endif
}

template <class T>
inline Vec<T, kLanes<T>> load_lanes(LaneMask<T> mask, const T* source) {
  using V = Vec<T, kLanes<T>>;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return bit_cast<V>(_mm512_maskz_loadu_ps(mask, source));
  } else {
    return bit_cast<V>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), source));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return bit_cast<V>(_mm256_maskload_ps(source, bit_cast<__m256i>(mask)));
  } else {
    return bit_cast<V>(_mm256_maskload_pd(source, bit_cast<__m256i>(mask)));
  }
#else
  V result = {};
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    if (mask[lane]) result[lane] = source[lane];
  }
  return result;
#endif
}

// The first `count` lanes, at most all; the others are 0.
template <class T>
inline Vec<T, kLanes<T>> load_first(const T* source, int64_t count) {
  return count >= kLanes<T> ? load<Vec<T, kLanes<T>>>(source)
                            : load_lanes<T>(first_lanes<T>(count), source);
}

template <class T>
inline void store_first(T* target, Vec<T, kLanes<T>> value, int64_t count) {
  if (count >= kLanes<T>) {
    store(target, value);
  } else if (count > 0) {
    __builtin_memcpy(target, &value, count * sizeof(T));
  }
}

// Bounds of the relative errors of the functions below, over their whole range, with and
// without fused multiply-adds; tests/cpp/vec_accuracy.cpp measures them.
constexpr double kExpRelativeError = 1.5e-7;
constexpr double kExpm1RelativeError = 1.5e-7;
constexpr double kLog1pRelativeError = 3.5e-7;
// The same in units in the last place of the exact result (measured: 1.03, 1.65 and 3.24).
constexpr double kExpUlpError = 1.2;
constexpr double kExpm1UlpError = 1.8;
constexpr double kLog1pUlpError = 3.5;

// x = k ln 2 + r with |r| <= ln(2) / 2: power = 2^k and expm1(r), for x in [-87, 87].
// ln 2 is split in two as in Cody and Waite, Software Manual for the Elementary Functions (1980);
// the polynomial is the Taylor series of expm1 to r^7, whose remainder at ln(2) / 2 is 6e-9.
template <int Lanes>
struct ExpParts {
  Vec<float, Lanes> power, expm1;
};

template <int Lanes>
inline ExpParts<Lanes> exp_parts(Vec<float, Lanes> x) {
  using Float = Vec<float, Lanes>;
  using Int = Vec<int32_t, Lanes>;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Float shifted = x * 1.44269504f + kRound;
  const Float k = shifted - kRound;
  Float r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  Float p = broadcast<Float>(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * (r * r) + r;
  const Int exponent = (bit_cast<Int>(shifted) - 0x4B400000 + 127) << 23;
  return {bit_cast<Float>(exponent), p};
}

// exp(x) for x in [-87, 87]; the caller clamps.
template <int Lanes>
inline Vec<float, Lanes> exp_clamped(Vec<float, Lanes> x) {
  const ExpParts<Lanes> parts = exp_parts<Lanes>(x);
  return parts.power * parts.expm1 + parts.power;
}

// exp(x) - 1 for x in [-80, 80]; the caller clamps. Exact in 2^k, so small x lose nothing.
template <int Lanes>
inline Vec<float, Lanes> expm1_clamped(Vec<float, Lanes> x) {
  const ExpParts<Lanes> parts = exp_parts<Lanes>(x);
  return parts.power * parts.expm1 + (parts.power - 1.0f);
}

// log(1 + x) for finite x > -0.95.
// u = 1 + x loses the low bits of x; they come back as (x - (u - 1)) / u. The logarithm of the
// mantissa m in [sqrt(1/2), sqrt(2)) is 2 atanh(s), s = (m - 1) / (m + 1), by its series to s^9.
template <int Lanes>
inline Vec<float, Lanes> log1p_clamped(Vec<float, Lanes> x) {
  using Float = Vec<float, Lanes>;
  using Int = Vec<int32_t, Lanes>;
  const Float u = x + 1.0f;
  const Float lost = (x - (u - 1.0f)) / u;
  const Int bits = bit_cast<Int>(u);
  // 0x3F3504F3 is sqrt(1/2): the exponent is counted from there.
  const Int exponent = (bits - 0x3F3504F3) >> 23;
  const Int mantissa_bits = bits - (exponent << 23);
  const Float m = bit_cast<Float>(mantissa_bits);
  const Float s = (m - 1.0f) / (m + 1.0f);
  const Float z = s * s;
  Float series = broadcast<Float>(2.0f / 9.0f);
  series = series * z + 2.0f / 7.0f;
  series = series * z + 2.0f / 5.0f;
  series = series * z + 2.0f / 3.0f;
  series = series * z + 2.0f;
  const Float k = __builtin_convertvector(exponent, Float);
  return (k * -2.12194440e-4f + (series * s + lost)) + k * 0.693359375f;
}

// Double takes the C library, lane by lane: it serves models in double, where accuracy counts.
template <int Lanes>
inline Vec<double, Lanes> exp_clamped(Vec<double, Lanes> x) {
  for (int lane = 0; lane < Lanes; ++lane) x[lane] = ::exp(x[lane]);
  return x;
}

template <int Lanes>
inline Vec<double, Lanes> expm1_clamped(Vec<double, Lanes> x) {
  for (int lane = 0; lane < Lanes; ++lane) x[lane] = ::expm1(x[lane]);
  return x;
}

template <int Lanes>
inline Vec<double, Lanes> log1p_clamped(Vec<double, Lanes> x) {
  for (int lane = 0; lane < Lanes; ++lane) x[lane] = ::log1p(x[lane]);
  return x;
}

}  // namespace
}  // namespace fastprune
