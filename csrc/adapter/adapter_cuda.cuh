// What the adapter's CUDA kernels share: the tile of 64 tokens by 64 columns, the activations, and LayerNorm of a tile.
#pragma once
#include "adapter/adapter.h"
#include "common/cuda/dropout.cuh"
#include "common/cuda/row.cuh"
#include "common/cuda/tile.cuh"

namespace lwft::cuda {

constexpr int kWarps = 4, kThreads = kWarps * kWarpLanes;
constexpr int kRows = 16 * kWarps;  // tokens of a block, 16 (one mma tile) per warp
constexpr int kChunk = 64;          // columns of x, and of out, per stage

LWFT_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::relu: return x < 0.0f ? 0.0f : x;  // NaN passes, as in torch
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::gelu_tanh: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::tanh: return tanhf(x);
    case Activation::leaky_relu: return x > 0.0f ? x : static_cast<float>(kLeakyReluSlope) * x;
    case Activation::sigmoid: return 1.0f / (1.0f + expf(-x));
    case Activation::identity: break;
  }
  return x;
}

// d act(x) / dx
LWFT_DEVICE float activation_slope(Activation activation, float x) {
  switch (activation) {
    case Activation::relu: return x > 0.0f ? 1.0f : 0.0f;
    // Phi(x) + x phi(x), phi the normal density
    case Activation::gelu: return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
    case Activation::gelu_tanh: {
      const float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
      return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
    }
    case Activation::silu: {
      const float s = 1.0f / (1.0f + expf(-x));
      return s * (1.0f + x * (1.0f - s));
    }
    case Activation::tanh: {
      const float t = tanhf(x);
      return 1.0f - t * t;
    }
    case Activation::leaky_relu: return x > 0.0f ? 1.0f : static_cast<float>(kLeakyReluSlope);
    case Activation::sigmoid: {
      const float s = 1.0f / (1.0f + expf(-x));
      return s * (1.0f - s);
    }
    case Activation::identity: break;
  }
  return 1.0f;
}

// The staged chunk of x becomes (x - mean) * rstd * weight + bias, in place.
template <class T, class P>
LWFT_DEVICE void normalise(const P& p, int64_t first_row, int first_column, const float* mean, const float* rstd,
                           T* chunk) {
  const T* weight = static_cast<const T*>(p.norm_weight);
  const T* bias = static_cast<const T*>(p.norm_bias);
  for (int i = thread_index(); i < kRows * kChunk / 8; i += kThreads) {
    const int r = i / (kChunk / 8), c = i % (kChunk / 8) * 8;
    if (first_row + r >= p.tokens || first_column + c >= p.model_dim) continue;
    Vector8<T>& v = *reinterpret_cast<Vector8<T>*>(chunk + r * (kChunk + kPad) + c);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float w = to_float(weight[first_column + c + e]);
      const float b = bias == nullptr ? 0.0f : to_float(bias[first_column + c + e]);
      v.element[e] = from_float<T>((to_float(v.element[e]) - mean[r]) * rstd[r] * w + b);
    }
  }
}

}  // namespace lwft::cuda
