// The activations of the adapter on vectors, as torch.nn.functional defines them.
#pragma once
#include "adapter/adapter.h"
#include "common/cpu/vec_math.h"

namespace lwft::LWFT_ISA {

// value = act(z) and slope = act'(z). A caller who wants only one pays for one: this is inlined.
template <Activation A, class V>
inline void activate(V z, V& value, V& slope) {
  using T = LaneOf<V>;
  const V zero{}, one = zero + T{1};
  if constexpr (A == Activation::relu) {
    value = max(zero, z);  // NaN passes, as in torch
    slope = select(z > zero, one, zero);
  } else if constexpr (A == Activation::gelu) {
    // z Phi(z); the slope is Phi(z) + z phi(z), phi the normal density
    constexpr T kSqrtHalf = T(0.70710678118654752440), kDensity = T(0.39894228040143267794);
    const V phi = T(0.5) * (one + erf(z * kSqrtHalf));
    value = z * phi;
    slope = phi + z * kDensity * exp(T(-0.5) * z * z);
  } else if constexpr (A == Activation::gelu_tanh) {
    // z (1 + tanh(u)) / 2, u = sqrt(2 / pi) (z + 0.044715 z^3)
    constexpr T kSlope = T(0.79788456080286535588), kCubic = T(0.044715);
    const V square = z * z, t = tanh(kSlope * z * (one + kCubic * square));
    value = T(0.5) * z * (one + t);
    slope = T(0.5) * (one + t) + T(0.5) * z * (one - t * t) * kSlope * (one + 3 * kCubic * square);
  } else if constexpr (A == Activation::silu) {
    const V s = sigmoid(z);
    value = z * s;
    slope = s * (one + z * (one - s));
  } else if constexpr (A == Activation::tanh) {
    value = tanh(z);
    slope = one - value * value;
  } else if constexpr (A == Activation::leaky_relu) {
    value = select(z > zero, z, z * T(kLeakyReluSlope));
    slope = select(z > zero, one, zero + T(kLeakyReluSlope));
  } else if constexpr (A == Activation::sigmoid) {
    value = sigmoid(z);
    slope = value * (one - value);
  } else {
    value = z;
    slope = one;
  }
}

// Calls f with the activation as a compile-time constant, so that the loop inside f has no branch.
template <class F>
inline void visit_activation(Activation activation, const F& f) {
  using A = Activation;
  switch (activation) {
    case A::relu: return f(std::integral_constant<A, A::relu>{});
    case A::gelu: return f(std::integral_constant<A, A::gelu>{});
    case A::gelu_tanh: return f(std::integral_constant<A, A::gelu_tanh>{});
    case A::silu: return f(std::integral_constant<A, A::silu>{});
    case A::tanh: return f(std::integral_constant<A, A::tanh>{});
    case A::leaky_relu: return f(std::integral_constant<A, A::leaky_relu>{});
    case A::sigmoid: return f(std::integral_constant<A, A::sigmoid>{});
    case A::identity: return f(std::integral_constant<A, A::identity>{});
  }
}

}  // namespace lwft::LWFT_ISA
