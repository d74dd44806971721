// The inline functions of common/cpu, behind function pointers: what tests need to drive each level of them.
#pragma once
#include <cstring>

#include "common/dropout.h"
#include "common/dtype.h"

namespace lwft {

enum class Unary : int32_t { exp, exp2, tanh, erf, sigmoid };

// A matrix of any dtype and strides, as a test hands it over.
struct ProbeMatrix {
  DType dtype;
  const void* data;
  int64_t row_stride, col_stride;
};

// `type` is the arithmetic type, f32 or f64: a, c and panels are arrays of it.
struct Probes {
  int (*lanes)(DType type);
  void (*unary)(DType type, Unary function, int64_t n, const void* x, void* y);
  void (*sum_and_max)(DType type, const void* x, void* result);  // x: `lanes` numbers; result: two
  // from -> T -> to, read with a stride; T is f64 if either is, else f32
  void (*convert)(DType from_dtype, const void* from, int64_t stride, int64_t n, DType to_dtype, void* to);
  int64_t (*padded)(DType type, int64_t n);
  void (*pack_panels)(DType type, ProbeMatrix b, int64_t k, int64_t n, void* panels);
  void (*gemm)(DType type, int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row, int64_t a_col,
               const void* panels, void* c, int64_t ldc, bool accumulate);
  bool multiplies_bfloat16;
  // panels and a are arrays of pairs, k, a_row and a_col counted in pairs; gemm_pairs is null without the above
  void (*pack_pair_panels)(ProbeMatrix b, int64_t k, int64_t n, void* panels);
  void (*gemm_pairs)(int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row, int64_t a_col, const void* panels,
                     float* c, int64_t ldc, bool accumulate);
  // floats in parts: how many words the panels take; null without matrix registers
  int64_t (*part_panels)(int64_t k, int64_t n);
  void (*pack_part_panels)(ProbeMatrix b, int64_t k, int64_t n, void* panels);
  // with the rows first .. first + k - 1 of `packed`, or, with all of them, of an a that is split beforehand
  void (*gemm_parts)(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const void* panels,
                     int64_t first, int64_t packed, float* c, int64_t ldc, bool accumulate, bool split);
  void (*dot_rows)(DType type, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, ProbeMatrix b, void* c,
                   int64_t ldc, bool accumulate);
  void (*combine_rows)(DType type, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, ProbeMatrix b, void* c,
                       int64_t ldc, bool accumulate);
  void (*dropout_multipliers)(DType type, const Dropout&, int64_t row, int64_t col0, int64_t n, void* out);
  void (*dropout_row)(DType type, const Dropout&, int64_t row, int64_t col0, int64_t n, void* values);
  // results[i] = i, by way of scratch memory; with `fail` one task asks for too much of it
  void (*run_tasks)(int64_t tasks, bool fail, int64_t* results);
  double (*peak_flops)(DType type, double seconds);  // of the GEMM micro-kernel, on a tile in the first cache
};

#ifdef LWFT_ISA_LEVELS

#define X(level)              \
  namespace level {           \
  extern const Probes probes; \
  }
LWFT_ISA_LEVELS
#undef X

// By name of the level; null if the build does not have it.
inline const Probes* find_probes(const char* isa) {
#define X(level) \
  if (std::strcmp(isa, #level) == 0) return &level::probes;
  LWFT_ISA_LEVELS
#undef X
  return nullptr;
}

#endif

}  // namespace lwft
