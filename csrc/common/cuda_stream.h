// The stream a CUDA kernel is to run on: torch's current one of the tensor's device.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "common/op.h"

// In libtorch_cuda alone. Weak, so that the same library loads in a torch without CUDA, where it is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace lwft {

// A cudaStream_t. The caller holds a DeviceGuard of the same device.
inline void* current_cuda_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "lwft: this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

}  // namespace lwft
