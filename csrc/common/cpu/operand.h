// What kernels hand to the products of tile.h.
//
// Kernels are templates over E, what the products multiply: float or double; pairs of bfloat16 where the machine has
// an instruction for them and activations and parameters are bfloat16; or floats in parts, where it has matrix registers.
// Everything between the products is in T = SumOf<E>. Here is what E changes: how rows become a left-hand side, of
// LeftOf<E>, and matrices packed panels, of E.
#pragma once
#include "common/cpu/row.h"
#include "common/cpu/tile.h"

namespace lwft::LWFT_ISA {

template <class E>
constexpr bool kIsPair = std::is_same_v<E, BFloat16Pair>;
// Whether panels are rows of numbers as they are, which other code than gemm may read.
template <class E>
constexpr bool kPanelsAreRows = std::is_same_v<E, SumOf<E>>;

// How many elements of a left-hand side n neighbours along k are, and how many neighbours one is.
template <class E>
constexpr int64_t units(int64_t n) {
  return kIsPair<E> ? pairs(n) : n;
}
template <class E>
constexpr int64_t kUnit = kIsPair<E> ? 2 : 1;

// What the numbers of an operand are in memory.
template <class E>
using Element = std::conditional_t<kIsPair<E>, BFloat16, SumOf<E>>;

// ---- left-hand sides, of L = LeftOf<E> ----

template <class L>
inline Element<L>* elements_of(L* operand) {
  return reinterpret_cast<Element<L>*>(operand);
}

// A row of n numbers to be written one by one: an odd last pair is filled with zero already.
template <class L>
inline Element<L>* elements(L* row, int64_t n) {
  if constexpr (kIsPair<L>) {
    row[pairs(n) - 1].second = 0;
  }
  return elements_of(row);
}

// A row of n numbers, rounded to L if need be; an odd last pair is filled with zero.
template <class L>
inline void store_operand(const SumOf<L>* row, int64_t n, L* to) {
  if constexpr (!kIsPair<L>) {
    if (row == to) return;
  }
  Element<L>* const out = elements(to, n);
  for_columns<SumOf<L>>(n, [&](auto at, int) LWFT_INLINE { store_at<SumOf<L>>(out, at, load_at<SumOf<L>>(row, at)); });
}

// Rows of a tensor where they lie: if they cannot be used so, data is null.
template <class L>
inline Tile<L> operand_in_place(DType dtype, const void* base, int64_t offset, int64_t row_stride, int64_t n) {
  if constexpr (kIsPair<L>) {
    if (dtype == DType::bf16 && n % 2 == 0 && row_stride % 2 == 0) {
      return {static_cast<const L*>(element(dtype, base, offset)), row_stride / 2};
    }
  } else if (dtype == dtype_of<L>()) {
    return {static_cast<const L*>(base) + offset, row_stride};
  }
  return {nullptr, 0};
}

// ---- panels ----

template <class E>
inline void pack_operand(DType dtype, const void* source, int64_t row_stride, int64_t col_stride, int64_t k, int64_t n,
                         E* panels) {
  if constexpr (kIsPair<E>) {
    pack_pair_panels(dtype, source, row_stride, col_stride, k, n, panels);
  } else if constexpr (std::is_same_v<E, FloatParts>) {
    pack_part_panels(dtype, source, row_stride, col_stride, k, n, panels);
  } else {
    pack_panels(dtype, source, row_stride, col_stride, k, n, panels);
  }
}

}  // namespace lwft::LWFT_ISA
