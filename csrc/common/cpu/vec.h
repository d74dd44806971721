// Vectors: what the kernels are written in. One source, compiled once per instruction set ("level").
//
// A level is a set of compiler flags plus -DLWFT_ISA=<baseline|avx2|avx512|avx512_bf16|amx_bf16>. Everything a kernel
// includes lives in namespace lwft::LWFT_ISA: were an inline function shared by two levels, the linker would
// keep one copy, and if that is the AVX-512 one an older machine dies in it. So these headers hold no code of
// the standard library either: no std::vector, no std::min.
//
// Vec<T> is the compiler's own vector type: + - * / and comparisons work on it, v[i] is a lane, a comparison
// gives a Mask<T> (all bits set in the lanes where it holds). Intrinsics appear only where the generic form
// has no good code.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/dtype.h"

#ifndef LWFT_ISA
#error "compile with -DLWFT_ISA=<level> and that level's flags"
#endif

namespace lwft::LWFT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

// A vector of N lanes of T, whether or not the machine has a register of that size.
template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Lanes = typename VectorOf<T, N>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
using Vec = Lanes<T, kLanes<T>>;

// The integers as wide as T, signed and unsigned: bit patterns and masks.
template <class T>
using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <class T>
using Unsigned = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});

template <class V>
using LaneOf = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
template <class V>
constexpr int kLanesOf = static_cast<int>(sizeof(V) / sizeof(LaneOf<V>));

// The same bits as another type of the same size.
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- scalars ----

template <class I>
constexpr I minimum(I a, I b) {
  return a < b ? a : b;
}
template <class I>
constexpr I maximum(I a, I b) {
  return a > b ? a : b;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- load and store: never need alignment ----

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class T>
inline void store(T* to, Vec<T> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// A store that leaves the caches as they are, `to` aligned to the vector. An ordinary one first reads the line from
// memory, which for a result larger than the caches is as much traffic as writing it. Other threads see such stores after
// a finish_streaming of the thread that made them.
template <class V>
inline void stream(void* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
#endif
  __builtin_memcpy(to, &v, sizeof(v));
}
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first n lanes (0 <= n <= kLanes); the others are zero, and their memory is not touched.
template <class T>
inline Vec<T> load_first(const T* from, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
  if constexpr (std::is_same_v<T, double>) return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), from);
#endif
  T lanes[kLanes<T>] = {};
  __builtin_memcpy(lanes, from, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store_first(T* to, Vec<T> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), v);
    return;
  }
  if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << n) - 1), v);
    return;
  }
#endif
  T lanes[kLanes<T>];
  store(lanes, v);
  __builtin_memcpy(to, lanes, static_cast<size_t>(n) * sizeof(T));
}

// The columns j .. j + kLanes of a row that ends at n; lanes past the end read zero and are not written.
template <class T>
inline Vec<T> load_columns(const T* row, int64_t j, int64_t n) {
  return j + kLanes<T> <= n ? load(row + j) : load_first(row + j, n - j);
}
template <class T>
inline void store_columns(T* row, int64_t j, int64_t n, Vec<T> v) {
  if (j + kLanes<T> <= n) {
    store(row + j, v);
  } else {
    store_first(row + j, v, n - j);
  }
}

// ---- lane by lane ----

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x (x + 0 is not: -0), so the compiler leaves just the broadcast
}

// 0, 1, 2, ...
template <class T>
inline Vec<T> lane_index() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

// a * b + c; one rounding where the level has a fused instruction (the build allows contraction).
template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}

template <class M, class V>
inline V select(M mask, V where_set, V elsewhere) {
  return mask ? where_set : elsewhere;
}

// True in lanes 0 .. n-1 (any n).
template <class T>
inline Mask<T> first_lanes(int64_t n) {
  const Int<T> count = static_cast<Int<T>>(maximum<int64_t>(0, minimum<int64_t>(n, kLanes<T>)));
  return lane_index<Int<T>>() < broadcast(count);
}

// The larger / smaller. Where one is NaN the result is b: write max(limit, x) to let a NaN in x through.
template <class V>
inline V max(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>) return _mm512_maskz_max_ps(0xFFFF, a, b);
  if constexpr (std::is_same_v<V, Vec<double>>) return _mm512_maskz_max_pd(0xFF, a, b);
#endif
  return a > b ? a : b;
}

template <class V>
inline V min(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>) return _mm512_maskz_min_ps(0xFFFF, a, b);
  if constexpr (std::is_same_v<V, Vec<double>>) return _mm512_maskz_min_pd(0xFF, a, b);
#endif
  return a < b ? a : b;
}

template <class V>
using BitsOf = Lanes<Unsigned<LaneOf<V>>, kLanesOf<V>>;

// The sign bit of each lane, and nothing else.
template <class V>
inline BitsOf<V> sign_bit(V v) {
  using U = LaneOf<BitsOf<V>>;
  return bit_cast<BitsOf<V>>(v) & (U{1} << (8 * sizeof(U) - 1));
}

template <class V>
inline V abs(V v) {
  return bit_cast<V>(bit_cast<BitsOf<V>>(v) ^ sign_bit(v));
}

// |magnitude| with the sign of `sign`; magnitude must not be negative.
template <class V>
inline V with_sign(V magnitude, V sign) {
  return bit_cast<V>(bit_cast<BitsOf<V>>(magnitude) | sign_bit(sign));
}

// ---- over all lanes: a fixed tree (halves folded onto each other), so the same bits every time ----

template <class V, int... I>
inline auto low_half(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, I...);
}
template <class V, int... I>
inline auto high_half(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I + kLanesOf<V> / 2)...);
}

template <class V>
inline LaneOf<V> sum(V v) {
  if constexpr (kLanesOf<V> == 2) {
    return v[0] + v[1];
  } else {
    using Half = std::make_integer_sequence<int, kLanesOf<V> / 2>;
    return sum(low_half(v, Half{}) + high_half(v, Half{}));
  }
}

template <class V>
inline LaneOf<V> max_lane(V v) {
  if constexpr (kLanesOf<V> == 2) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    using Half = std::make_integer_sequence<int, kLanesOf<V> / 2>;
    return max_lane(max(low_half(v, Half{}), high_half(v, Half{})));
  }
}

}  // namespace lwft::LWFT_ISA
