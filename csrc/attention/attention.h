// out = dropout(softmax(softcap(scale * q k^T) + bias, masked)) v over prefix and keys, in tiles with a
// running maximum (online softmax: Milakov & Gimelshein 2018; tiling and backward: FlashAttention-2, Dao
// 2023, algorithms 1 and 2). No (S, L) matrix is ever stored. Nothing here knows torch.
#pragma once
#include "common/dropout.h"
#include "common/dtype.h"

namespace lwft {

// A 4-D tensor by pointer and element strides, in the order of its shape comment. Stride 0 = broadcast; the
// last stride is 1 (of bias and mask 1 or 0).
struct Strided {
  const void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};
struct StridedOut {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

struct AttentionShape {
  int64_t batch, heads, kv_heads, queries, keys, prefix, head_dim;
  DType dtype;  // of q, k, v, prefix, out and their gradients
};

// Which keys a query sees and how a score becomes a weight; shared by forward and backward.
struct AttentionRule {
  double scale;
  double softcap;  // 0 = none: s -> softcap * tanh(s / softcap)
  bool causal;     // aligned to the last key: query i sees keys j <= i + keys - queries
  // 0 = none; else, with i' = i + keys - queries, key j is seen iff i' - window < j and, where not causal,
  // j < i' + window
  int64_t window;
  Strided bias;  // (B, H, S, L) of bias_dtype or null; added after softcap
  DType bias_dtype;
  Strided mask;                // (B, H, S, L) bool, nonzero = may attend, or null
  const int64_t* lengths;      // (B) number of valid keys, or null; prefix keys are always valid
  Dropout dropout;             // row = (b * H + h) * S + i, col = j over prefix, then keys
  const int64_t* device_seed;  // CUDA: (seed, offset) in device memory, to stand for those of dropout; null on the CPU
};

struct AttentionForward {
  AttentionShape shape;
  AttentionRule rule;
  Strided q;                   // (B, H, S, D)
  Strided k, v;                // (B, Hkv, L, D)
  Strided prefix_k, prefix_v;  // (B, Hkv, P, D), batch stride 0 when shared; null when P == 0
  StridedOut out;              // (B, H, S, D)
  // (B, H, S) contiguous, accumulate dtype; natural logarithm; -inf where nothing may be seen
  void* lse;
  void* workspace;  // CUDA: attention_forward_workspace(p) floats in device memory
};

struct AttentionBackward {
  AttentionShape shape;
  AttentionRule rule;
  Strided grad_out;      // (B, H, S, D)
  const void* grad_lse;  // (B, H, S) contiguous, accumulate dtype, or null
  Strided q, k, v, prefix_k, prefix_v, out;
  const void* lse;
  StridedOut dq;         // null when not wanted, as all below
  StridedOut dk, dv;     // (B, Hkv, L, D)
  void* dbias;           // contiguous (bias_size[0..3]) of bias_dtype: summed over broadcast dimensions
  int64_t bias_size[4];  // each the full size or 1
  void* dprefix_k;       // contiguous (prefix_batch, Hkv, P, D): summed over the batch when shared
  void* dprefix_v;
  int64_t prefix_batch;  // B or 1
};

// The CUDA kernels (attention_cuda.cu, attention_decode_cuda.cu); their pointers are the device's. Why they cannot serve
// this call, or null.
const char* attention_cuda_declines(const AttentionForward&);
// Enqueues them on a cudaStream_t and returns a cudaError_t.
int attention_forward_cuda(const AttentionForward&, void* stream);
int64_t attention_forward_workspace(const AttentionForward&);

// One level of the CPU kernels (common/cpu/dispatch.h).
struct AttentionKernels {
  void (*forward)(const AttentionForward&);
  void (*backward)(const AttentionBackward&);
};

}  // namespace lwft
