"""The module form of `adapter`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lwft_kernels import checks
from lwft_kernels.adapter.functional import adapter, checked_activation


class BottleneckAdapter(nn.Module):
    """x + dropout(scale * up(act(down(layer_norm(x))))): the adapter of Houlsby et al. 2019, figure 2.

    The parameters stand in children `down` and `up` (`nn.Linear`) and, with `layer_norm`, `norm`
    (`nn.LayerNorm`): the state_dict keys are ``down.weight``, ``down.bias``, ``up.weight``, ``up.bias``,
    ``norm.weight``, ``norm.bias``. The children only hold them: they are not called, so hooks on them do not
    run.

    A fresh module is the identity (with `residual`): `up` starts at zero, `down` as `nn.Linear` starts, so
    that the first step moves `up` and the next ones both.

    Args:
        model_dim: width d of the model.
        bottleneck: width m of the bottleneck.
        activation: one of `lwft_kernels.adapter.functional.ACTIVATIONS`.
        bias: whether `down` and `up` have one.
        layer_norm: whether `x` passes through a LayerNorm first.
        eps: of that LayerNorm.
        scale: multiplies the branch.
        dropout: probability of an element of the branch to be zeroed in training.
        residual: whether the branch is added to something; without, the module returns the branch alone.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        model_dim: int,
        bottleneck: int,
        activation: str = "relu",
        *,
        bias: bool = True,
        layer_norm: bool = False,
        eps: float = 1e-5,
        scale: float = 1.0,
        dropout: float = 0.0,
        residual: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for word, size in (("model_dim", model_dim), ("bottleneck", bottleneck)):
            checks.size(name, word, size)
        self.model_dim = model_dim
        self.bottleneck = bottleneck
        self.activation = checked_activation(name, activation)
        self.scale = checks.number(name, "scale", scale)
        self.dropout = checks.probability(name, "dropout", dropout)
        self.residual = residual
        self.norm = nn.LayerNorm(model_dim, eps, device=device, dtype=dtype) if layer_norm else None
        self.down = nn.Linear(model_dim, bottleneck, bias, device=device, dtype=dtype)
        self.up = nn.Linear(bottleneck, model_dim, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the identity: `up` zero, `down` and `norm` as their classes start."""
        if self.norm is not None:
            self.norm.reset_parameters()
        self.down.reset_parameters()
        nn.init.zeros_(self.up.weight)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., d) -> (..., d). The branch is added to `residual` where one is given, else to `x`."""
        if residual is None:
            residual = x if self.residual else None
        elif not self.residual:
            raise ValueError("BottleneckAdapter: residual was given to a module built with residual=False")
        norm = self.norm
        return adapter(
            x,
            self.down.weight,
            self.down.bias,
            self.up.weight,
            self.up.bias,
            activation=self.activation,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            eps=1e-5 if norm is None else norm.eps,
            scale=self.scale,
            residual=residual,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.model_dim}, {self.bottleneck}, activation={self.activation}, scale={self.scale}, "
            f"dropout={self.dropout}, residual={self.residual}"
        )
