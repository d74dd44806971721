// Dropout as a kernel sees it: an element is kept iff its 32-bit draw is at least `threshold`, and then scaled.
#pragma once
#include <cstdint>

#include "common/philox.h"

namespace lwft {

struct Dropout {
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;   // floor(p * 2^32); 0 = no dropout
  double keep_scale = 1.0;  // 1 / (1 - p); 0 when p == 1, which drops what the threshold alone would let through

  LWFT_HOST_DEVICE bool active() const { return threshold != 0 || keep_scale != 1.0; }
};

inline Dropout make_dropout(uint64_t seed, uint64_t offset, double p) {
  Dropout dropout;
  dropout.seed = seed;
  dropout.offset = offset;
  const double threshold = p * 4294967296.0;
  dropout.threshold = threshold >= 4294967295.0 ? 0xFFFFFFFFu : static_cast<uint32_t>(threshold);
  dropout.keep_scale = p >= 1.0 ? 0.0 : 1.0 / (1.0 - p);
  return dropout;
}

LWFT_HOST_DEVICE bool dropout_keeps(const Dropout& dropout, int64_t row, int64_t col) {
  return philox_draw(dropout.seed, dropout.offset, row, col) >= dropout.threshold;
}

}  // namespace lwft
