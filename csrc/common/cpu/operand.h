// What kernels hand to the products of tile.h.
//
// Kernels are templates over E, what the products multiply: float or double, or pairs of bfloat16 where the machine has
// an instruction for them and activations and parameters are bfloat16. Everything between the products is in
// T = SumOf<E>. Here is what E changes: how rows become a left-hand side, and matrices packed panels.
#pragma once
#include "common/cpu/row.h"
#include "common/cpu/tile.h"

namespace lwft::LWFT_ISA {

template <class E>
constexpr bool kIsPair = std::is_same_v<E, BFloat16Pair>;

// How many E make n neighbours along k, and how many neighbours one E is.
template <class E>
constexpr int64_t units(int64_t n) {
  return kIsPair<E> ? pairs(n) : n;
}
template <class E>
constexpr int64_t kUnit = kIsPair<E> ? 2 : 1;

// What the numbers of an operand are in memory.
template <class E>
using Element = std::conditional_t<kIsPair<E>, BFloat16, E>;

template <class E>
inline Element<E>* elements_of(E* operand) {
  return reinterpret_cast<Element<E>*>(operand);
}

// A row of n numbers to be written one by one: an odd last pair is filled with zero already.
template <class E>
inline Element<E>* elements(E* row, int64_t n) {
  if constexpr (kIsPair<E>) {
    row[pairs(n) - 1].second = 0;
  }
  return elements_of(row);
}

// A row of n numbers, rounded to E if need be; an odd last pair is filled with zero.
template <class E>
inline void store_operand(const SumOf<E>* row, int64_t n, E* to) {
  if constexpr (!kIsPair<E>) {
    if (row == to) return;
  }
  Element<E>* const out = elements(to, n);
  for_columns<SumOf<E>>(n, [&](auto at, int) LWFT_INLINE { store_at<SumOf<E>>(out, at, load_at<SumOf<E>>(row, at)); });
}

template <class E>
inline void pack_operand(DType dtype, const void* source, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n,
                         E* panels) {
  if constexpr (kIsPair<E>) {
    pack_pair_panels(dtype, source, row_stride, col_stride, k, n, panels);
  } else {
    pack_panels(dtype, source, row_stride, col_stride, k, n, panels);
  }
}

// Rows of a tensor as a left-hand side, where they lie: if not, data is null.
template <class E>
inline Tile<E> operand_in_place(DType dtype, const void* base, int64_t offset, int64_t row_stride, int64_t n) {
  if constexpr (kIsPair<E>) {
    if (dtype == DType::bf16 && n % 2 == 0 && row_stride % 2 == 0) {
      return {static_cast<const E*>(element(dtype, base, offset)), row_stride / 2};
    }
  } else if (dtype == dtype_of<E>()) {
    return {static_cast<const E*>(base) + offset, row_stride};
  }
  return {nullptr, 0};
}

}  // namespace lwft::LWFT_ISA
