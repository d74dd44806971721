// out += a b in 16 bits: the product with a frozen weight, for machines where the vendor's is a plain loop.
#pragma once
#include "common/dtype.h"

namespace lwft {

struct BaseProduct {
  int64_t rows, depth, columns;
  DType dtype;    // bf16 or f16, of a, b and out
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
}
#endif
