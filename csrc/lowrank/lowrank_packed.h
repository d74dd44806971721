// A frozen weight that is held in packed form alone, and the two products with it: out += x W^T and dx += dy W.
#pragma once
#include "common/dtype.h"

namespace lwft {

struct PackedWeight {
  int64_t out_features, in_features;  // of W
  DType dtype;                        // f64, f32 or, where a level multiplies it, bf16
  void* blocks;                       // packed_bytes of them
};

struct PackedProduct {
  PackedWeight weight;
  bool transpose;  // out += a W^T, else out += a W
  int64_t rows;
  const void* a;  // (rows, in_features) where it is W^T, else (rows, out_features); unit stride along a row
  int64_t a_row_stride;
  void* out;  // (rows, out_features) where it is W^T, else (rows, in_features); likewise
  int64_t out_row_stride;
};

}  // namespace lwft

#ifdef LWFT_ISA
namespace lwft::LWFT_ISA {
// The size of blocks; 0 where this level has no product for the dtype.
int64_t packed_bytes(int64_t out_features, int64_t in_features, DType dtype);
// From and to W (out_features, in_features), contiguous.
void pack_weight(const PackedWeight& packed, const void* weight);
void unpack_weight(const PackedWeight& packed, void* weight);
void packed_product(const PackedProduct& p);
}  // namespace lwft::LWFT_ISA
#endif
