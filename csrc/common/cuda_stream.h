// Between the ops and their CUDA kernels: the stream a kernel is to run on, torch's current one of the tensor's device;
// and what becomes of a kernel that declines or fails.
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

// `reason` is why a kernel cannot serve a call, or null. Python gives such a call to Triton; it looks for these words
// (lwft_kernels/registration.py).
inline void require_cuda(const char* reason) {
  STD_TORCH_CHECK(reason == nullptr, "lwft: the CUDA kernel declines: ", reason);
}

// The seed lies on the device, where the kernel reads it.
template <class P>
void set_device_dropout(P& p, const MaybeTensor& seed, double dropout_p) {
  if (!seed) return;
  p.dropout = make_dropout(0, 0, dropout_p);
  p.device_seed = static_cast<const int64_t*>(seed->const_data_ptr());
}

inline void require_no_error(int error) { STD_TORCH_CHECK(error == 0, "lwft: CUDA error ", error); }

}  // namespace lwft
