// Products in a row on one thread.
//
// Matrix registers (tile_amx.h) must be given their shapes before they are used, which takes as long as a small product, and be
// released afterwards. Between the calls of a kernel somebody else may have given them other shapes. So a kernel says when its
// products begin and end; parallel_for does so around the tasks of a thread. A product outside of a scope takes care of itself.
#pragma once

namespace lwft::LWFT_ISA {

#if defined(__AMX_BF16__)
void begin_products();  // tile_cpu.cpp
void end_products();

class ProductScope {
 public:
  ProductScope() { begin_products(); }
  ~ProductScope() { end_products(); }
  ProductScope(const ProductScope&) = delete;
  ProductScope& operator=(const ProductScope&) = delete;
};
#else
struct ProductScope {
  ProductScope() {}
};
#endif

}  // namespace lwft::LWFT_ISA
