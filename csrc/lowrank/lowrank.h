// out = bias + scale * dropout(x) A^T B^T, or out += ...: the product behind low_rank_linear, lora_linear and
// lora_delta_ (LoRA: Hu et al. 2021, eq. 3). The (tokens, rank) middle never leaves the cache but for the
// copy that backward needs. Nothing here knows torch.
#pragma once
#include "common/dropout.h"
#include "common/dtype.h"
#include "lowrank/lowrank_base.h"
#include "lowrank/lowrank_packed.h"

namespace lwft {

// The dtypes are all f64, or any mix of the others.
struct LowRankForward {
  int64_t tokens, in_features, rank, out_features, adapters;
  DType x_dtype, out_dtype, bias_dtype;
  DType param_dtype;  // of A and B
  const void* x;      // (tokens, in_features), unit stride along in_features
  int64_t x_row_stride;
  const void* a;                 // (adapters, rank, in_features) contiguous
  const void* b;                 // (adapters, out_features, rank) contiguous
  const int64_t* adapter_index;  // (tokens), -1 = no adapter for this row; null: all rows use adapter 0
  const void* bias;              // (out_features) or null; not read when accumulate
  double scale;
  Dropout dropout;             // on x: row = token, col = input feature
  const int64_t* device_seed;  // CUDA: (seed, offset) in device memory, where the host cannot fill them into `dropout`
  bool accumulate;             // out += the product, instead of out = bias + the product
  void* out;                   // (tokens, out_features), unit stride along out_features; shares no memory with x
  int64_t out_row_stride;
  // dropout(x) A^T, unscaled: (tokens, rank) contiguous, of accumulate_dtype(param_dtype), for a rounding to
  // 16 bits here would double the error of dB. 0 for a row without adapter. On the CPU null where no backward follows.
  void* hidden;
  void* workspace;  // CUDA: low_rank_forward_workspace(p) floats in device memory
};

struct LowRankBackward {
  int64_t tokens, in_features, rank, out_features, adapters;
  DType x_dtype, out_dtype, bias_dtype, param_dtype;
  const void* grad_out;  // (tokens, out_features) of out_dtype, unit stride along out_features
  int64_t grad_out_row_stride;
  const void* x;
  int64_t x_row_stride;
  const void* a;
  const void* b;
  const void* hidden;
  const int64_t* adapter_index;
  double scale;
  Dropout dropout;
  const int64_t* device_seed;
  void* dx;         // (tokens, in_features) of x_dtype, contiguous; null when not wanted, as all below
  void* da;         // like a; 0 for an adapter that no row uses
  void* db;         // like b; likewise
  void* dbias;      // (out_features) of bias_dtype: the column sums of grad_out
  void* workspace;  // CUDA: low_rank_backward_workspace(p) floats in device memory
};

// The CUDA kernels (lowrank_cuda.cu, lowrank_backward_cuda.cu); their pointers are the device's. An index that names no
// adapter gives NaN in its row, for the host does not wait to look. Why they cannot serve this call, or null:
const char* low_rank_cuda_declines(const LowRankForward&);
const char* low_rank_cuda_declines(const LowRankBackward&);
// Enqueue them on a cudaStream_t and return a cudaError_t.
int low_rank_forward_cuda(const LowRankForward&, void* stream);
int low_rank_backward_cuda(const LowRankBackward&, void* stream);
int64_t low_rank_forward_workspace(const LowRankForward&);
int64_t low_rank_backward_workspace(const LowRankBackward&);

// One level of the CPU kernels (common/cpu/dispatch.h).
struct LowRankKernels {
  void (*forward)(const LowRankForward&);
  void (*backward)(const LowRankBackward&);
  void (*base_product)(const BaseProduct&);
  bool (*base_product_is_faster)(const BaseProduct&);
  int64_t (*packed_bytes)(int64_t out_features, int64_t in_features, DType dtype);
  void (*pack_weight)(const PackedWeight&, const void* weight);
  void (*unpack_weight)(const PackedWeight&, void* weight);
  void (*packed_product)(const PackedProduct&);
};

}  // namespace lwft
