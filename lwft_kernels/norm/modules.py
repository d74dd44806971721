"""The module form of `add_layer_norm`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lwft_kernels import checks
from lwft_kernels.norm.functional import add_layer_norm


class AddLayerNorm(nn.LayerNorm):
    """LayerNorm(x + dropout(sublayer_out)): `nn.LayerNorm` together with the sum and the `nn.Dropout` before it.

    The state_dict is that of the `nn.LayerNorm` it replaces.

    Args:
        normalized_shape: the size of the last dimension (one dimension only).
        eps, elementwise_affine, bias, device, dtype: as in `nn.LayerNorm`.
        dropout: probability of an element of `sublayer_out` to be zeroed in training.
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        if isinstance(normalized_shape, int):
            checks.size("AddLayerNorm", "normalized_shape", normalized_shape)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"AddLayerNorm normalises over one dimension, got {normalized_shape}")
        self.dropout = checks.probability("AddLayerNorm", "dropout", dropout)

    def forward(self, x: Tensor, sublayer_out: Tensor) -> Tensor:  # type: ignore[override]
        """(..., d), (..., d) -> (..., d)."""
        p = self.dropout if self.training else 0.0
        return add_layer_norm(x, sublayer_out, self.weight, self.bias, self.eps, dropout_p=p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"
