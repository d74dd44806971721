"""What both directions of the adapter in Triton share: the activations, as torch.nn.functional defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from lwft_kernels.adapter.functional import ACTIVATIONS

_RELU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("relu"))
_GELU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("gelu"))
_GELU_TANH: tl.constexpr = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
_SILU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("silu"))
_TANH: tl.constexpr = tl.constexpr(ACTIVATIONS.index("tanh"))
_LEAKY_RELU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("leaky_relu"))
_SIGMOID: tl.constexpr = tl.constexpr(ACTIVATIONS.index("sigmoid"))


@triton.jit
def tanh(x):
    """The rule and the polynomial of csrc/common/cpu/vec_math.h: Triton itself has no tanh."""
    square = x * x
    series = 0.0209971790 + square * -0.00609671417
    series = -0.333333289 + square * (0.133327697 + square * (-0.0538509096 + square * series))
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.625, x + x * square * series, tl.where(x < 0.0, -large, large))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) and act'(z) of a float32 tile; of what the caller does not use the compiler leaves nothing."""
    if ACTIVATION == _RELU:
        value = tl.where(z <= 0.0, 0.0, z)  # NaN passes, as in torch
        slope = tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == _GELU:
        # z Phi(z); the slope is Phi(z) + z phi(z), phi the normal density
        phi = 0.5 * (1.0 + tl.erf(z * 0.70710678118654752440))
        value = z * phi
        slope = phi + z * 0.39894228040143267794 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == _GELU_TANH:
        # z (1 + tanh(u)) / 2, u = sqrt(2 / pi) (z + 0.044715 z^3)
        square = z * z
        t = tanh(0.79788456080286535588 * z * (1.0 + 0.044715 * square))
        value = 0.5 * z * (1.0 + t)
        du = 0.79788456080286535588 * (1.0 + 3.0 * 0.044715 * square)
        slope = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * du
    elif ACTIVATION == _SILU:
        s = tl.sigmoid(z)
        value = z * s
        slope = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == _TANH:
        value = tanh(z)
        slope = 1.0 - value * value
    elif ACTIVATION == _LEAKY_RELU:
        value = tl.where(z > 0.0, z, z * 0.01)
        slope = tl.where(z > 0.0, 1.0, 0.01)
    elif ACTIVATION == _SIGMOID:
        value = tl.sigmoid(z)
        slope = value * (1.0 - value)
    else:  # identity
        value = z
        slope = tl.full(z.shape, 1.0, tl.float32)
    return value, slope
