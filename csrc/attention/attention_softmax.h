// The softmax of rows of scores over blocks of keys, one after the other (online softmax: Milakov & Gimelshein 2018,
// algorithm 3): total = sum over the keys so far of exp(score - highest).
//
// What a row needs once a block (its largest score, its sum, the factor of what it has summed before) costs as much as
// several vectors of its scores, for it waits for itself. So rows are taken in groups, one for each lane of a vector, and
// all that is done for the whole group in one.
#pragma once
#include "attention/attention_scores.h"
#include "common/cpu/threads.h"
#include "common/cpu/transpose.h"

namespace lwft::LWFT_ISA {

template <class T>
constexpr int kGroupRows = kLanes<T>;

// Lane r of the result: the lanes of rows[r], put together by `op` in a fixed tree. Count is kLanes, when called.
template <int Count, class V, class Op>
inline V over_lanes(const V* rows, const Op& op) {
  if constexpr (Count == 1) {
    return rows[0];
  } else {
    constexpr int kHalf = Count / 2;
    using Index = std::make_integer_sequence<int, kLanesOf<V>>;
    const V a = over_lanes<kHalf>(rows, op), b = over_lanes<kHalf>(rows + kHalf, op);
    return op(upper_rows<kHalf>(a, b, Index{}), lower_rows<kHalf>(a, b, Index{}));
  }
}
template <class T>
inline Vec<T> sum_of_each(const Vec<T> (&rows)[kGroupRows<T>]) {
  return over_lanes<kGroupRows<T>>(rows, [](Vec<T> a, Vec<T> b) { return a + b; });
}
template <class T>
inline Vec<T> largest_of_each(const Vec<T> (&rows)[kGroupRows<T>]) {
  return over_lanes<kGroupRows<T>>(rows, [](Vec<T> a, Vec<T> b) { return max(a, b); });
}

// exp(scale * x - shift)
template <class T>
inline Vec<T> exp_difference(Vec<T> x, T scale, T shift) {
  return exp2((x * scale - shift) * Math<T>::kLog2e);
}

// The state of some rows: arrays of so many and a group more.
template <class T>
struct SoftmaxRows {
  T *highest, *total;

  SoftmaxRows(int64_t rows, Scratch& scratch)
      : highest(scratch.take<T>(rows + kGroupRows<T>)), total(scratch.take<T>(rows + kGroupRows<T>)) {
    fill(highest, 0, rows + kGroupRows<T>, -kInfinity<T>);
    fill(total, 0, rows + kGroupRows<T>, T{0});
  }
  SoftmaxRows(T* highest_in, T* total_in) : highest(highest_in), total(total_in) {}

  SoftmaxRows from(int64_t row) const { return {highest + row, total + row}; }

  // The largest scores of a block for a group of rows: afterwards `highest` is that of all so far, shift what to subtract
  // from each row's scores, and the result is what all that was summed before must be multiplied by.
  Vec<T> raise(Vec<T> largest, T* shift) const {
    const Vec<T> before = load(highest), now = max(before, largest);
    store(highest, now);
    // A row that has seen only -inf is shifted by 0: -inf minus -inf would be NaN.
    const Vec<T> by = select(now == broadcast(-kInfinity<T>), Vec<T>{}, now);
    store(shift, by);
    const Vec<T> factor = exp2((before - by) * Math<T>::kLog2e);
    store(total, load(total) * factor);
    return factor;
  }
  void add(Vec<T> sums) const { store(total, load(total) + sums); }

  T log_sum_exp(int64_t row) const {
    if (total[row] == 0) return -kInfinity<T>;
    if constexpr (std::is_same_v<T, float>) return highest[row] + __builtin_logf(total[row]);
    return highest[row] + static_cast<T>(__builtin_log(static_cast<double>(total[row])));
  }
  T inverse_total(int64_t row) const { return total[row] == 0 ? T{0} : T{1} / total[row]; }
};

// The scores of one row: the largest, lane by lane.
template <class T>
inline Vec<T> largest_lanes(int64_t n, const T* x) {
  Vec<T> first = broadcast(-kInfinity<T>), second = first;
  int64_t j = 0;
  for (; j + kLanes<T> < n; j += 2 * kLanes<T>) {
    first = max(first, load(x + j));
    second = max(second, load(x + j + kLanes<T>));
  }
  if (j < n) first = max(first, load(x + j));
  return max(first, second);
}

// to = exp(scale * x - shift), in whole vectors; returns the sum, lane by lane.
template <class T, class Out>
inline Vec<T> exponentiate(int64_t n, const T* x, T scale, T shift, Out* to) {
  Vec<T> first{}, second{};
  int64_t j = 0;
  for (; j + kLanes<T> < n; j += 2 * kLanes<T>) {
    const Vec<T> a = exp_difference(load(x + j), scale, shift),
                 b = exp_difference(load(x + j + kLanes<T>), scale, shift);
    store_as<T>(to + j, a);
    store_as<T>(to + j + kLanes<T>, b);
    first += a;
    second += b;
  }
  if (j < n) {
    const Vec<T> a = exp_difference(load(x + j), scale, shift);
    store_as<T>(to + j, a);
    first += a;
  }
  return first + second;
}

}  // namespace lwft::LWFT_ISA
