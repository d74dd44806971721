// Element types a kernel can be handed. Kernels are compiled for two arithmetic types only, float and double;
// the 16-bit types are converted tile by tile as they are read and written (see cpu/convert.h).
#pragma once
#include <cstddef>
#include <cstdint>

namespace lwft {

enum class DType : int32_t { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

constexpr size_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// The type sums and statistics are kept in: float for everything but float64.
constexpr DType accumulate_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// The address of element `index` of an array that starts at `base`.
inline const void* element(DType dtype, const void* base, int64_t index) {
  return static_cast<const char*>(base) + index * static_cast<int64_t>(element_size(dtype));
}

}  // namespace lwft
