// Reading and writing memory whose element type is known only at run time, as vectors of the arithmetic type
// T (float, or double for float64). The loop is compiled once per storage type: visit_storage(dtype, f) calls
// f with a value of the storage type, and load_as<T> / store_as do the rest.
#pragma once
#include "common/cpu/vec.h"

namespace lwft::LWFT_ISA {

// 16-bit floats exist only in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class F>
inline void visit_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Float16{});
  }
}

template <class T>
constexpr DType dtype_of() {
  if (std::is_same_v<T, double>) return DType::f64;
  if (std::is_same_v<T, float>) return DType::f32;
  return std::is_same_v<T, BFloat16> ? DType::bf16 : DType::f16;
}

// ---- N lanes of 16-bit floats to and from N lanes of float ----

template <int N>
inline Lanes<float, N> widen_bfloat16(Lanes<uint16_t, N> bits) {
  using Bits = Lanes<uint32_t, N>;
#if defined(__AVX512F__)  // where gcc 12 makes four instructions of the conversion below
  if constexpr (N == 16)
    return bit_cast<Lanes<float, N>>((Bits)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)bits) << 16);
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return bit_cast<Lanes<float, N>>((Bits)_mm256_cvtepu16_epi32((__m128i)bits) << 16);
#endif
  return bit_cast<Lanes<float, N>>(__builtin_convertvector(bits, Bits) << 16);
}

// Round to nearest even. The instruction of avx512_bf16 treats subnormals (below 1.2e-38) as zero; the rest
// is equal.
template <int N>
inline Lanes<uint16_t, N> narrow_bfloat16(Lanes<float, N> v) {
#if defined(__AVX512BF16__)
  if constexpr (N == 16) return (Lanes<uint16_t, N>)_mm512_cvtneps_pbh(v);
  if constexpr (N == 8) return (Lanes<uint16_t, N>)_mm256_cvtneps_pbh(v);
#endif
  using Bits = Lanes<uint32_t, N>;
  const Bits bits = bit_cast<Bits>(v);
  const Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet_nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector(select(v == v, rounded, quiet_nan), Lanes<uint16_t, N>);
}

template <int N>
inline Lanes<float, N> widen_float16(Lanes<uint16_t, N> half) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return _mm512_maskz_cvtph_ps(0xFFFF, (__m256i)half);
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return _mm256_cvtph_ps((__m128i)half);
#endif
#if defined(__aarch64__)
  if constexpr (N == 4) return vcvt_f32_f16((float16x4_t)half);
#endif
  // Shift exponent and mantissa into place and rebias by a multiplication, which also normalises subnormals;
  // an exponent of all ones (infinity, NaN) is set by hand.
  using Bits = Lanes<uint32_t, N>;
  const Bits bits = __builtin_convertvector(half, Bits);
  const Bits magnitude = (bits & 0x7FFFu) << 13;
  const Bits rebiased = bit_cast<Bits>(bit_cast<Lanes<float, N>>(magnitude) * 0x1p112f);
  const Bits special = magnitude | 0x7F800000u;
  return bit_cast<Lanes<float, N>>(((bits & 0x8000u) << 16) | select(magnitude >= (0x7C00u << 13), special, rebiased));
}

template <int N>
inline Lanes<uint16_t, N> narrow_float16(Lanes<float, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 16)
    return (Lanes<uint16_t, N>)_mm512_maskz_cvtps_ph(0xFFFF, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return (Lanes<uint16_t, N>)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
#if defined(__aarch64__)
  if constexpr (N == 4) return (Lanes<uint16_t, N>)vcvt_f16_f32(v);
#endif
  using Bits = Lanes<uint32_t, N>;
  const Bits bits = bit_cast<Bits>(v), magnitude = bits & 0x7FFFFFFFu;
  // Normal result: rebias, round to nearest even at bit 13; a carry runs into the exponent, up to infinity.
  const Bits normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal result: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by the addition
  // itself.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Lanes<float, N>>(magnitude) + 0.5f) - 0x3F000000u;
  Bits result = select(magnitude < (113u << 23), subnormal, normal);
  result = select(magnitude >= 0x47800000u, Bits{} + 0x7C00u, result);  // 65536 and more: infinity
  result = select(magnitude > 0x7F800000u, Bits{} + 0x7E00u, result);   // NaN
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), Lanes<uint16_t, N>);
}

// ---- a vector from and to any storage type ----

template <class T, class Storage>
inline Vec<T> load_as(const Storage* from) {
  constexpr int N = kLanes<T>;
  if constexpr (std::is_same_v<Storage, T>) {
    return load(from);
  } else if constexpr (sizeof(Storage) == 2) {
    Lanes<uint16_t, N> half;
    __builtin_memcpy(&half, from, sizeof(half));
    if constexpr (std::is_same_v<Storage, BFloat16>) return __builtin_convertvector(widen_bfloat16<N>(half), Vec<T>);
    if constexpr (std::is_same_v<Storage, Float16>) return __builtin_convertvector(widen_float16<N>(half), Vec<T>);
  } else {
    Lanes<Storage, N> v;
    __builtin_memcpy(&v, from, sizeof(v));
    return __builtin_convertvector(v, Vec<T>);
  }
}

template <class T, class Storage>
inline void store_as(Storage* to, Vec<T> v) {
  constexpr int N = kLanes<T>;
  if constexpr (std::is_same_v<Storage, T>) {
    store(to, v);
  } else if constexpr (sizeof(Storage) == 2) {
    const Lanes<float, N> single = __builtin_convertvector(v, Lanes<float, N>);
    Lanes<uint16_t, N> half;
    if constexpr (std::is_same_v<Storage, BFloat16>) half = narrow_bfloat16<N>(single);
    if constexpr (std::is_same_v<Storage, Float16>) half = narrow_float16<N>(single);
    __builtin_memcpy(to, &half, sizeof(half));
  } else {
    const Lanes<Storage, N> other = __builtin_convertvector(v, Lanes<Storage, N>);
    __builtin_memcpy(to, &other, sizeof(other));
  }
}

// The first n elements (0 <= n <= kLanes<T>); the other lanes read zero, and are not written.
template <class T, class Storage>
inline Vec<T> load_first_as(const Storage* from, int64_t n) {
  if constexpr (std::is_same_v<Storage, T>) {
    return load_first(from, n);
  } else {
    Storage elements[kLanes<T>] = {};
    __builtin_memcpy(elements, from, static_cast<size_t>(n) * sizeof(Storage));
    return load_as<T>(elements);
  }
}

template <class T, class Storage>
inline void store_first_as(Storage* to, Vec<T> v, int64_t n) {
  if constexpr (std::is_same_v<Storage, T>) {
    store_first(to, v, n);
  } else {
    Storage elements[kLanes<T>];
    store_as<T>(elements, v);
    __builtin_memcpy(to, elements, static_cast<size_t>(n) * sizeof(Storage));
  }
}

// One element.
template <class T, class Storage>
inline T load_one(const Storage* from) {
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    return static_cast<T>(bit_cast<float>(static_cast<uint32_t>(from->bits) << 16));
  } else if constexpr (std::is_same_v<Storage, Float16>) {
    return load_first_as<T>(from, 1)[0];
  } else {
    return static_cast<T>(*from);
  }
}

template <class T, class Storage>
inline void store_one(Storage* to, T x) {
  if constexpr (sizeof(Storage) == 2) {
    store_first_as<T>(to, broadcast(x), 1);
  } else {
    *to = static_cast<Storage>(x);
  }
}

// One element of a dtype known at run time. For a statistic per row, not for a loop over columns.
template <class T>
inline T load_one(DType dtype, const void* base, int64_t index) {
  T x{};
  visit_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    x = load_one<T>(static_cast<const Storage*>(base) + index);
  });
  return x;
}

template <class T>
inline void store_one(DType dtype, void* base, int64_t index, T x) {
  visit_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    store_one<T>(static_cast<Storage*>(base) + index, x);
  });
}

// ---- rows: elements base[offset + i * stride], i < n; offset and stride counted in elements ----

template <class T>
inline void load_row(DType dtype, const void* base, int64_t offset, int64_t n, T* to, int64_t stride = 1) {
  visit_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const Storage* from = static_cast<const Storage*>(base) + offset;
    if (stride != 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = load_one<T>(from + i * stride);
      return;
    }
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) store(to + i, load_as<T>(from + i));
    if (i < n) store_first(to + i, load_first_as<T>(from + i, n - i), n - i);
  });
}

template <class T>
inline void store_row(DType dtype, const T* from, int64_t n, void* base, int64_t offset, int64_t stride = 1) {
  visit_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    Storage* to = static_cast<Storage*>(base) + offset;
    if (stride != 1) {
      for (int64_t i = 0; i < n; ++i) store_one<T>(to + i * stride, from[i]);
      return;
    }
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) store_as<T>(to + i, load(from + i));
    if (i < n) store_first_as<T>(to + i, load_first(from + i, n - i), n - i);
  });
}

// The row as T: where it lies, if it already is T with unit stride, else converted into scratch (n elements).
template <class T>
inline const T* view_row(DType dtype, const void* base, int64_t offset, int64_t n, T* scratch, int64_t stride = 1) {
  if (dtype == dtype_of<T>() && stride == 1) return static_cast<const T*>(base) + offset;
  load_row(dtype, base, offset, n, scratch, stride);
  return scratch;
}

// Rows of T in memory, unit stride along a row.
template <class T>
struct Tile {
  const T* data;
  int64_t row_stride;

  const T* row(int64_t i) const { return data + i * row_stride; }
};

// `rows` rows of n elements as T: where they lie, or converted into scratch (rows * n elements).
template <class T>
inline Tile<T> view_tile(DType dtype, const void* base, int64_t offset, int64_t row_stride, int64_t rows, int64_t n,
                         T* scratch, int64_t col_stride = 1) {
  if (dtype == dtype_of<T>() && col_stride == 1) return {static_cast<const T*>(base) + offset, row_stride};
  for (int64_t i = 0; i < rows; ++i) load_row(dtype, base, offset + i * row_stride, n, scratch + i * n, col_stride);
  return {scratch, n};
}

}  // namespace lwft::LWFT_ISA
