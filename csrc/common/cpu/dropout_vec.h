// The draws of common/philox.h, 64 columns of a row at a time, and dropout on a row. The same bits on every
// level.
#pragma once
#include "common/cpu/vec.h"
#include "common/dropout.h"

namespace lwft::LWFT_ISA {

using PhiloxVec = Vec<uint32_t>;

// The 64-bit products of the lanes of a with m, as high and low words.
inline void multiply_wide(PhiloxVec a, uint32_t m, PhiloxVec& high, PhiloxVec& low) {
#if defined(__x86_64__)
  // The machine multiplies the even lanes, leaving 64 bits each; the odd ones are shifted down for a second
  // turn.
  using Wide = Vec<uint64_t>;
  const Wide lanes = bit_cast<Wide>(a), multiplier = broadcast<uint64_t>(m);
#if defined(__AVX512F__)
  const Wide even = (Wide)_mm512_maskz_mul_epu32(0xFF, (__m512i)lanes, (__m512i)multiplier);
  const Wide odd = (Wide)_mm512_maskz_mul_epu32(0xFF, (__m512i)(lanes >> 32), (__m512i)multiplier);
#elif defined(__AVX2__)
  const Wide even = (Wide)_mm256_mul_epu32((__m256i)lanes, (__m256i)multiplier);
  const Wide odd = (Wide)_mm256_mul_epu32((__m256i)(lanes >> 32), (__m256i)multiplier);
#else
  const Wide even = (Wide)_mm_mul_epu32((__m128i)lanes, (__m128i)multiplier);
  const Wide odd = (Wide)_mm_mul_epu32((__m128i)(lanes >> 32), (__m128i)multiplier);
#endif
  constexpr uint64_t kLowWord = 0xFFFFFFFFu;
  high = bit_cast<PhiloxVec>((even >> 32) | (odd & ~kLowWord));
  low = bit_cast<PhiloxVec>((even & kLowWord) | (odd << 32));
#else
  using Wide = Lanes<uint64_t, kLanes<uint32_t>>;
  const Wide product = __builtin_convertvector(a, Wide) * uint64_t{m};
  high = __builtin_convertvector(product >> 32, PhiloxVec);
  low = __builtin_convertvector(product, PhiloxVec);
#endif
}

// The 64 draws of the columns 64 * block .. 64 * block + 63.
inline void philox_draw_block(const Dropout& dropout, int64_t row, int64_t block, uint32_t* draws) {
  for (int lane = 0; lane < kPhiloxLanes; lane += kLanes<uint32_t>) {
    PhiloxVec c0 = lane_index<uint32_t>() + static_cast<uint32_t>(block * kPhiloxLanes + lane);
    PhiloxVec c1 = broadcast(static_cast<uint32_t>(row));
    PhiloxVec c2 = broadcast(static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32));
    PhiloxVec c3 = broadcast(static_cast<uint32_t>(dropout.offset));
    uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      PhiloxVec high0, low0, high1, low1;
      multiply_wide(c0, kPhiloxMultiplier0, high0, low0);
      multiply_wide(c2, kPhiloxMultiplier1, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    store(draws + lane, c0);
    store(draws + lane + kPhiloxLanes, c1);
    store(draws + lane + 2 * kPhiloxLanes, c2);
    store(draws + lane + 3 * kPhiloxLanes, c3);
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
