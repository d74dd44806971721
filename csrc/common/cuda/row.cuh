// Rows in global memory as warps read them: vectors of 8 elements, converted to float32; and sums over lanes.
#pragma once
#include "common/cuda/portable.cuh"

namespace lwft::cuda {

LWFT_DEVICE float to_float(float x) { return x; }
template <>
LWFT_DEVICE float from_float<float>(float x) {
  return x;
}

LWFT_DEVICE uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
LWFT_DEVICE float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// 16 bytes of 16-bit elements are one load, 32 of float32 two.
template <class T>
struct alignas(16) Vector8 {
  T element[8];
};

// On the host: whether vectors may be read from there.
inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T>
LWFT_DEVICE void load(const T* from, float (&to)[8]) {
  const Vector8<T> v = *reinterpret_cast<const Vector8<T>*>(from);
#pragma unroll
  for (int e = 0; e < 8; ++e) to[e] = to_float(v.element[e]);
}

template <class T>
LWFT_DEVICE void store(T* to, const float (&from)[8]) {
  Vector8<T> v;
#pragma unroll
  for (int e = 0; e < 8; ++e) v.element[e] = from_float<T>(from[e]);
  *reinterpret_cast<Vector8<T>*>(to) = v;
}

// In a fixed order, and the same on every lane.
LWFT_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = kWarpLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace lwft::cuda
