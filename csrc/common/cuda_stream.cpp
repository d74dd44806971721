#include "common/cuda_stream.h"

// For tests, which have no GPU: whether the library, loaded into this torch, has found torch's CUDA streams.
extern "C" __attribute__((visibility("default"))) int lwft_has_stream() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}
