// out = residual + dropout(scale * up(act(down(layer_norm(x)))))   (bottleneck adapter: Houlsby et al. 2019, figure 2;
// scale: He et al. 2022, section 4). Nothing here knows torch.
#pragma once
#include "common/dropout.h"
#include "common/dtype.h"

namespace lwft {

// The order is that of lwft_kernels.adapter.functional.ACTIVATIONS.
enum class Activation : int32_t { relu, gelu, gelu_tanh, silu, tanh, leaky_relu, sigmoid, identity };
constexpr int64_t kActivations = static_cast<int64_t>(Activation::identity) + 1;
constexpr double kLeakyReluSlope = 0.01;  // torch.nn.functional.leaky_relu's default

struct AdapterForward {
  int64_t tokens, model_dim, bottleneck;
  DType dtype;        // of x, residual and out
  DType param_dtype;  // of the weights, the biases and hidden
  const void* x;      // (tokens, model_dim), unit stride along model_dim
  int64_t x_row_stride;
  const void* norm_weight;  // (model_dim), or null: no LayerNorm at all
  const void* norm_bias;    // (model_dim) or null
  double eps;
  const void* down_weight;  // (bottleneck, model_dim) contiguous
  const void* down_bias;    // (bottleneck) or null
  Activation activation;
  const void* up_weight;  // (model_dim, bottleneck) contiguous
  const void* up_bias;    // (model_dim) or null
  double scale;
  Dropout dropout;             // row = token, col = feature of the (tokens, model_dim) branch
  const int64_t* device_seed;  // CUDA: (seed, offset) in device memory, to stand for those of dropout; null on the CPU
  const void* residual;        // (tokens, model_dim), or null for none; may be x itself
  int64_t residual_row_stride;
  void* out;     // (tokens, model_dim) contiguous
  void* hidden;  // (tokens, bottleneck) contiguous: down(...) + bias before the activation, kept for backward
  void* mean;    // (tokens) of accumulate_dtype(dtype); written when norm_weight is given (all three null where no
                 // backward follows, on the CPU)
  void* rstd;    // (tokens) likewise
};

struct AdapterBackward {
  int64_t tokens, model_dim, bottleneck;
  DType dtype, param_dtype;
  const void* grad_out;  // (tokens, model_dim), unit stride along model_dim
  int64_t grad_out_row_stride;
  const void* x;
  int64_t x_row_stride;
  const void* norm_weight;
  const void* norm_bias;
  const void* mean;
  const void* rstd;
  const void* down_weight;
  const void* hidden;
  Activation activation;
  const void* up_weight;
  double scale;
  Dropout dropout;
  const int64_t* device_seed;  // as in AdapterForward
  bool residual_is_x;          // then grad_out is added to dx here, instead of by one more pass of autograd
  void* dx;                    // (tokens, model_dim) contiguous, of dtype; null when not wanted, as all below
  void* ddown_weight;          // of param_dtype, contiguous, like the parameter; the rest likewise
  void* ddown_bias;
  void* dup_weight;
  void* dup_bias;
  void* dnorm_weight;
  void* dnorm_bias;
  void* workspace;  // CUDA: adapter_backward_workspace(p) floats in device memory
};

// The CUDA kernels (adapter_cuda.cu, adapter_backward_cuda.cu); their pointers are the device's. Why they cannot serve
// this call, or null.
const char* adapter_cuda_declines(const AdapterForward&);
const char* adapter_cuda_declines(const AdapterBackward&);
// Enqueue them on a cudaStream_t and return a cudaError_t.
int adapter_forward_cuda(const AdapterForward&, void* stream);
int adapter_backward_cuda(const AdapterBackward&, void* stream);
int64_t adapter_backward_workspace(const AdapterBackward&);

// One level of the CPU kernels (common/cpu/dispatch.h).
struct AdapterKernels {
  void (*forward)(const AdapterForward&);
  void (*backward)(const AdapterBackward&);
};

}  // namespace lwft
