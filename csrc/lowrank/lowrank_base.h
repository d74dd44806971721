// out += a b, the product with a frozen weight: in 16 bits, for machines where the vendor's is a plain loop, and in float32 for
// those with matrix registers, which the vendor's leaves idle.
#pragma once
#include "common/dtype.h"

namespace lwft {

struct BaseProduct {
  int64_t rows, depth, columns;
  DType dtype;    // bf16, f16 or, where the level multiplies it, f32: of a, b and out
  const void* a;  // (rows, depth), unit stride along depth
  int64_t a_row_stride;
  const void* b;  // (depth, columns), unit stride along one of them
  int64_t b_row_stride, b_col_stride;
  void* out;  // (rows, columns), unit stride along columns
  int64_t out_row_stride;
};

}  // namespace lwft

#ifdef LWFT_ISA
namespace lwft::LWFT_ISA {
void base_product(const BaseProduct& p);
// Whether base_product in float32 is faster than the vendor's product; where it does not exist it is not.
bool base_product_is_faster(const BaseProduct& p);
}  // namespace lwft::LWFT_ISA
#endif
