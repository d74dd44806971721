// The draws of common/philox.h, 64 columns of a row at a time, and dropout on a row. The same bits on every
// level.
#pragma once
#include "common/cpu/vec.h"
#include "common/dropout.h"

namespace lwft::LWFT_ISA {

// A word of Philox per 64-bit lane, in its low half; what the high half holds does not matter. The machine
// multiplies words just so, and no lane has to change its place between the rounds.
using PhiloxLanes = Vec<uint64_t>;

// The 64-bit products of the low halves.
inline PhiloxLanes multiply_low_halves(PhiloxLanes a, uint32_t multiplier) {
#if defined(__AVX512F__)
  return (PhiloxLanes)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(multiplier));
#elif defined(__AVX2__)
  return (PhiloxLanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(multiplier));
#elif defined(__x86_64__)
  return (PhiloxLanes)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(multiplier));
#elif defined(__aarch64__)
  return (PhiloxLanes)vmull_n_u32(vmovn_u64((uint64x2_t)a), multiplier);
#else
  return (a & 0xFFFFFFFFu) * multiplier;
#endif
}

// word[w], of the counters first, first + 2, first + 4, ...
struct PhiloxWordLanes {
  PhiloxLanes word[4];
};

inline PhiloxWordLanes philox_every_second(const Dropout& dropout, int64_t row, int64_t first) {
  PhiloxLanes c0 = 2 * lane_index<uint64_t>() + static_cast<uint64_t>(first);
  PhiloxLanes c1 = broadcast(static_cast<uint64_t>(row)), c2 = c1 >> 32, c3 = broadcast(dropout.offset);
  uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const PhiloxLanes product0 = multiply_low_halves(c0, kPhiloxMultiplier0);
    const PhiloxLanes product1 = multiply_low_halves(c2, kPhiloxMultiplier1);
    c0 = (product1 >> 32) ^ c1 ^ k0;
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ k1;
    c3 = product0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The 64 draws of the columns 64 * block .. 64 * block + 63.
inline void philox_draw_block(const Dropout& dropout, int64_t row, int64_t block, uint32_t* draws) {
  constexpr uint64_t kLowHalf = 0xFFFFFFFFu;
#pragma GCC unroll 2
  for (int lane = 0; lane < kPhiloxLanes; lane += kLanes<uint32_t>) {
    const int64_t counter = block * kPhiloxLanes + lane;
    const PhiloxWordLanes even = philox_every_second(dropout, row, counter);
    const PhiloxWordLanes odd = philox_every_second(dropout, row, counter + 1);
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
      store(draws + w * kPhiloxLanes + lane, bit_cast<Vec<uint32_t>>((even.word[w] & kLowHalf) | (odd.word[w] << 32)));
    }
  }
}

// apply(i, keep, count) for the elements i .. i + count - 1 of the n in row `row` that start at column col0:
// keep is a mask over kLanes<T> lanes, of which the first `count` count. Fast where col0 is a multiple of 64.
template <class T, class Apply>
inline void for_each_kept(const Dropout& dropout, int64_t row, int64_t col0, int64_t n, const Apply& apply) {
  constexpr int N = kLanes<T>;
  using Wide = Vec<Unsigned<T>>;
  const Wide threshold = broadcast<Unsigned<T>>(dropout.threshold);
  alignas(64) uint32_t draws[kPhiloxColumns + N] = {};
  for (int64_t i = 0; i < n;) {
    const int64_t first = (col0 + i) % kPhiloxColumns;
    const int64_t count = minimum<int64_t>(kPhiloxColumns - first, n - i);
    philox_draw_block(dropout, row, (col0 + i) / kPhiloxColumns, draws);
    for (int64_t j = 0; j < count; j += N) {
      Lanes<uint32_t, N> words;
      __builtin_memcpy(&words, draws + first + j, sizeof(words));
      apply(i + j, __builtin_convertvector(words, Wide) >= threshold, minimum<int64_t>(N, count - j));
    }
    i += count;
  }
}

// out[i] = keep_scale where the element (row, col0 + i) is kept, else 0; i < n.
template <class T>
inline void dropout_multipliers(const Dropout& dropout, int64_t row, int64_t col0, int64_t n, T* out) {
  const Vec<T> keep_scale = broadcast(static_cast<T>(dropout.keep_scale));
  for_each_kept<T>(dropout, row, col0, n, [&](int64_t i, Mask<T> keep, int64_t count) {
    const Vec<T> multiplier = select(keep, keep_scale, Vec<T>{});
    if (count == kLanes<T>) {
      store(out + i, multiplier);
    } else {
      store_first(out + i, multiplier, count);
    }
  });
}

// Dropout in place: values[i] is scaled where the element (row, col0 + i) is kept, else becomes 0; i < n.
template <class T>
inline void dropout_row(const Dropout& dropout, int64_t row, int64_t col0, int64_t n, T* values) {
  const Vec<T> keep_scale = broadcast(static_cast<T>(dropout.keep_scale));
  for_each_kept<T>(dropout, row, col0, n, [&](int64_t i, Mask<T> keep, int64_t count) {
    if (count == kLanes<T>) {
      store(values + i, select(keep, load(values + i) * keep_scale, Vec<T>{}));
    } else {
      store_first(values + i, select(keep, load_first(values + i, count) * keep_scale, Vec<T>{}), count);
    }
  });
}

}  // namespace lwft::LWFT_ISA
