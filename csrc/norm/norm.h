// out = LayerNorm(x + dropout(sublayer_out)) * weight + bias   (Ba et al. 2016, eq. 3-4; "Add & Norm" of Vaswani et
// al. 2017, section 3.1), forward and backward in one pass each. Nothing here knows torch.
#pragma once
#include "common/dropout.h"
#include "common/dtype.h"

namespace lwft {

struct AddLayerNormForward {
  int64_t tokens, model_dim;
  DType x_dtype, sublayer_dtype, out_dtype, param_dtype;
  const void* x;  // (tokens, model_dim), unit stride along model_dim, as every row below
  int64_t x_row_stride;
  const void* sublayer_out;  // (tokens, model_dim)
  int64_t sublayer_row_stride;
  const void* weight;  // (model_dim) of param_dtype, or null for ones
  const void* bias;    // (model_dim) of param_dtype, or null for zeros
  double eps;
  Dropout dropout;             // row = token, col = feature
  const int64_t* device_seed;  // CUDA: (seed, offset) in device memory, to stand for those of dropout; null on the CPU
  void* out;                   // (tokens, model_dim) contiguous, of out_dtype
  void* mean;                  // (tokens) of accumulate_dtype(out_dtype)
  void* rstd;                  // (tokens) likewise
};

struct AddLayerNormBackward {
  int64_t tokens, model_dim;
  DType x_dtype, sublayer_dtype, out_dtype, param_dtype;
  const void* grad_out;  // (tokens, model_dim) of out_dtype
  int64_t grad_out_row_stride;
  const void* x;
  int64_t x_row_stride;
  const void* sublayer_out;
  int64_t sublayer_row_stride;
  const void* weight;
  const void* mean;
  const void* rstd;
  Dropout dropout;
  const int64_t* device_seed;
  void* dx;             // (tokens, model_dim) contiguous, of x_dtype; null when not wanted, as all below
  void* dsublayer_out;  // (tokens, model_dim) contiguous, of sublayer_dtype
  void* dweight;        // (model_dim) of param_dtype
  void* dbias;          // (model_dim) of param_dtype
  void* workspace;      // CUDA: add_layer_norm_backward_workspace(p) floats in device memory
};

// The CUDA kernels (norm_cuda.cu); their pointers are the device's. Why they cannot serve this call, or null.
const char* add_layer_norm_cuda_declines(const AddLayerNormForward&);
const char* add_layer_norm_cuda_declines(const AddLayerNormBackward&);
// Enqueue them on a cudaStream_t and return a cudaError_t.
int add_layer_norm_forward_cuda(const AddLayerNormForward&, void* stream);
int add_layer_norm_backward_cuda(const AddLayerNormBackward&, void* stream);
int64_t add_layer_norm_backward_workspace(const AddLayerNormBackward&);

// One level of the CPU kernels (common/cpu/dispatch.h).
struct NormKernels {
  void (*forward)(const AddLayerNormForward&);
  void (*backward)(const AddLayerNormBackward&);
};

}  // namespace lwft
