// Element types a kernel can be handed. Kernels are compiled for two arithmetic types only, float and double;
// the 16-bit types are converted tile by tile as they are read and written (see cpu/vec.h).
#pragma once
#include <cstddef>
#include <cstdint>

namespace lwft {

enum class DType : int32_t { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

constexpr size_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// The type sums and statistics are kept in: float for everything but float64.
constexpr DType accumulate_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace lwft
