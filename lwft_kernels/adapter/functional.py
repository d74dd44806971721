"""``adapter``: the bottleneck adapter in one pass over the tokens."""

from __future__ import annotations

from torch import Tensor

from lwft_kernels import backend, checks, dropout
from lwft_kernels.adapter import autograd, reference

_OP = "adapter"
_LARGEST_TRITON_BOTTLENECK = 256  # z of a block of tokens lies in the registers of one program

# The order is that of csrc/adapter/adapter.h: the kernels know an activation by its position.
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu", "sigmoid", "identity")
_SYNONYMS = {"swish": "silu"}
_POSITIONS = {name: position for position, name in enumerate(ACTIVATIONS)}


def checked_activation(op: str, activation: object) -> str:
    """`activation` under the name it has in `ACTIVATIONS`."""
    if not isinstance(activation, str):
        raise TypeError(f"{op}: activation must be a string, got {type(activation).__name__}")
    name = _SYNONYMS.get(activation, activation)
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return name


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str = "relu",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: float = 1.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """residual + dropout(scale * up(act(down(layer_norm(x)))))

    The bottleneck adapter of Houlsby et al. 2019 (figure 2), with the scale of He et al. 2022 (section 4).
    `x` is read once and the result written once; backward keeps the (T, m) bottleneck beside the inputs and
    nothing wider.

    Args:
        x: (..., d), float64, float32, bfloat16 or float16.
        down_weight, down_bias: (m, d) and (m,) or None, as in `nn.Linear(d, m)`.
        up_weight, up_bias: (d, m) and (d,) or None, as in `nn.Linear(m, d)`. All parameters have one dtype:
            that of `x`, or float32 beside 16-bit activations.
        activation: one of `ACTIVATIONS`; "gelu" is the exact one, "gelu_tanh" the tanh approximation,
            "leaky_relu" has slope 0.01; "swish" is another name of "silu".
        norm_weight, norm_bias: (d,): with `norm_weight` given, `x` passes through a LayerNorm first.
        eps: added to the variance of the LayerNorm.
        scale: multiplies the branch, before dropout.
        residual: what the branch is added to, of the shape and dtype of `x`; often `x` itself. None adds
            nothing.
        dropout_p: probability of an element of the branch to be zeroed. It is applied whenever it is above 0
            (as in `scaled_dot_product_attention`): pass 0.0 in evaluation.

    Returns:
        (..., d) in the dtype of `x`. Under autocast `x`, `residual` and the parameters are cast to its dtype,
        as for `linear`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value; the message names it.
    """
    if backend.attempts(x) and dropout.is_probability(dropout_p) and type(eps) is float and type(scale) is float:
        position = _POSITIONS.get(activation) if type(activation) is str else None
        if position is not None:
            seed = dropout.draw_seed(x.device) if dropout_p else None
            found: Tensor | None = autograd.try_adapter(
                x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias,
                None if residual is x else residual, seed, position, eps, scale, dropout_p, residual is x,
            )  # fmt: skip
            if found is not None:
                return found

    checks.floating(_OP, "x", x)
    checks.floating(_OP, "down_weight", down_weight)
    checks.floating(_OP, "up_weight", up_weight)
    for name, value in (
        ("down_bias", down_bias),
        ("up_bias", up_bias),
        ("norm_weight", norm_weight),
        ("norm_bias", norm_bias),
    ):
        if value is not None:
            checks.floating(_OP, name, value)
    if residual is not None and residual is not x:
        checks.floating(_OP, "residual", residual)
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{_OP}: norm_bias needs norm_weight; pass ones for a LayerNorm that does not scale")

    residual_is_x = residual is x
    autocast = checks.autocast_dtype(x.device)
    if autocast is not None:
        x = checks.cast(x, autocast)
        residual = x if residual_is_x else checks.cast(residual, autocast)
        down_weight, up_weight = checks.cast(down_weight, autocast), checks.cast(up_weight, autocast)
        down_bias, up_bias = checks.cast(down_bias, autocast), checks.cast(up_bias, autocast)
        norm_weight, norm_bias = checks.cast(norm_weight, autocast), checks.cast(norm_bias, autocast)

    checks.at_least_dims(_OP, "x", x, 1, "(..., d)")
    d = x.shape[-1]
    if d == 0:
        raise ValueError(f"{_OP}: the last dimension of x is empty; the model width d must be at least 1")
    checks.shape(_OP, "down_weight", down_weight, (None, d), "(m, d)")
    m = down_weight.shape[0]
    if m == 0:
        raise ValueError(f"{_OP}: down_weight has no rows; the bottleneck m must be at least 1")
    checks.same_device(_OP, "down_weight", down_weight, "x", x)
    checks.parameter_dtype(_OP, "down_weight", down_weight, "x", x)
    for name, parameter, shape, meaning in (
        ("down_bias", down_bias, (m,), "(m,)"),
        ("up_weight", up_weight, (d, m), "(d, m)"),
        ("up_bias", up_bias, (d,), "(d,)"),
        ("norm_weight", norm_weight, (d,), "(d,)"),
        ("norm_bias", norm_bias, (d,), "(d,)"),
    ):
        if parameter is not None:
            checks.shape(_OP, name, parameter, shape, meaning)
            checks.same_device(_OP, name, parameter, "x", x)
            checks.same_dtype(_OP, name, parameter, "down_weight", down_weight)
    if residual is not None and not residual_is_x:
        checks.shape(_OP, "residual", residual, tuple(x.shape), "that of x")
        checks.same_device(_OP, "residual", residual, "x", x)
        checks.same_dtype(_OP, "residual", residual, "x", x)
    activation = checked_activation(_OP, activation)
    eps = checks.positive(_OP, "eps", eps)
    scale = checks.number(_OP, "scale", scale)
    dropout_p = checks.probability(_OP, "dropout_p", dropout_p)

    seed = dropout.draw_seed(x.device) if dropout_p > 0.0 else None
    if not backend.use_kernels(_OP, x, triton_limit=lambda: _triton_limit(m)):
        return reference.adapter(
            x, down_weight, down_bias, up_weight, up_bias, activation=activation, norm_weight=norm_weight,
            norm_bias=norm_bias, eps=eps, scale=scale, residual=residual, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    out: Tensor = autograd.adapter(
        x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, None if residual_is_x else residual,
        seed, _POSITIONS[activation], eps, scale, dropout_p, residual_is_x,
    )  # fmt: skip
    return out


def _triton_limit(m: int) -> str | None:
    if m <= _LARGEST_TRITON_BOTTLENECK:
        return None
    return f"Triton's kernels take a bottleneck of at most {_LARGEST_TRITON_BOTTLENECK}, not {m}"
