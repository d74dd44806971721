// Dropout as a CUDA kernel gets it: what was known on the host, and the seed, which lies on the device.
#pragma once
#include "common/cuda/portable.cuh"
#include "common/dropout.h"

namespace lwft::cuda {

LWFT_DEVICE Dropout device_dropout(Dropout dropout, const int64_t* seed) {
  if (seed != nullptr) {
    dropout.seed = static_cast<uint64_t>(seed[0]);
    dropout.offset = static_cast<uint64_t>(seed[1]);
  }
  return dropout;
}

}  // namespace lwft::cuda
