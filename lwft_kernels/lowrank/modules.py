"""In place of `nn.Linear`: `LowRankLinear` factorises its weight, `LoRALinear` adds a branch to it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lwft_kernels import checks
from lwft_kernels.lowrank import prepack as packing
from lwft_kernels.lowrank.functional import lora_linear, low_rank_linear
from lwft_kernels.lowrank.packed_weight import PackedWeight


def _checked_linear(module: str, linear: object) -> nn.Linear:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{module}: linear must be an nn.Linear, got {type(linear).__name__}")
    if type(linear).forward is not nn.Linear.forward:  # a LoRALinear, say, whose branch would be lost
        raise TypeError(f"{module}: linear must compute what nn.Linear does, not be a {type(linear).__name__}")
    return linear


class LowRankLinear(nn.Module):
    """x down_weight^T up_weight^T + bias: an `nn.Linear` of the weight up_weight @ down_weight, rank `rank`.

    It has rank * (in_features + out_features) weights in place of in_features * out_features. `up_weight @
    down_weight` starts with the variance of `nn.Linear`'s weight.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        rank: at least 1; below in_features * out_features / (in_features + out_features) it saves anything.

    The state_dict holds ``down_weight`` (rank, in_features), ``up_weight`` (out_features, rank) and ``bias``
    (out_features,).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rank = checks.size("LowRankLinear", "rank", rank)
        self.down_weight = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up_weight = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform; up_weight @ down_weight and bias get the variance of nn.Linear's: 1 / (3 in_features)."""
        nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
        bound = math.sqrt(3 / self.rank)
        nn.init.uniform_(self.up_weight, -bound, bound)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int) -> LowRankLinear:
        """The layer of rank `rank` nearest to `linear`, by truncated singular value decomposition.

        W = U S V^T (Eckart and Young 1936), cut to the `rank` largest singular values; sqrt(S) goes to either
        side, so         both factors train at one scale. The bias is copied. At full rank the result is
        `linear` up to rounding.

        Args:
            linear: (out_features, in_features), left as it is.
            rank: from 1 to min(in_features, out_features).
        """
        linear = _checked_linear("LowRankLinear.from_linear", linear)
        rank = checks.size("LowRankLinear.from_linear", "rank", rank)
        full = min(linear.in_features, linear.out_features)
        if rank > full:
            raise ValueError(f"LowRankLinear.from_linear: rank must be at most {full} for {linear}, got {rank}")
        weight = linear.weight.detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
        root = s[:rank].sqrt()
        module = cls(
            linear.in_features,
            linear.out_features,
            rank,
            linear.bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        module.down_weight = nn.Parameter((root[:, None] * v[:rank]).to(weight.dtype))
        module.up_weight = nn.Parameter((u[:, :rank] * root).to(weight.dtype))
        if linear.bias is not None:
            module.bias = nn.Parameter(linear.bias.detach().clone())
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return low_rank_linear(x, self.down_weight, self.up_weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class LoRALinear(nn.Linear):
    """`nn.Linear` with frozen weights and a LoRA branch: x W^T + b + (lora_alpha / rank) dropout(x) A^T B^T.

    Hu et al. 2021, section 4.1. A starts random and B zero, so a new layer computes what the linear layer
    did.

    Args:
        in_features, out_features: as in `nn.Linear`.
        rank: at least 1.
        lora_alpha: the branch is scaled by lora_alpha / rank; None for `rank`, a scale of 1.
        lora_dropout: probability of an input of the branch to be zeroed in training.
        bias, device, dtype: as in `nn.Linear`. Beside 16-bit weights A and B are float32, as PEFT makes them,
            so that an optimizer's small steps are not rounded away.
        prepack: call `prepack`, and warn if the weight stays plain.

    The state_dict holds ``weight`` and ``bias`` as `nn.Linear` has them, ``lora_a`` (rank, in_features) and
    ``lora_b`` (out_features, rank); the names ``lora_A`` and ``lora_B`` of loralib are understood by
    `load_state_dict`. It is the same merged or not.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        prepack: bool = False,
    ) -> None:
        rank = checks.size("LoRALinear", "rank", rank)
        lora_dropout = checks.probability("LoRALinear", "lora_dropout", lora_dropout)
        lora_alpha = float(rank if lora_alpha is None else lora_alpha)
        if not math.isfinite(lora_alpha):
            raise ValueError(f"LoRALinear: lora_alpha must be finite, got {lora_alpha}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.rank, self.lora_alpha, self.lora_dropout = rank, lora_alpha, lora_dropout
        adapter_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_a = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=adapter_dtype))
        self.lora_b = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=adapter_dtype))
        # While merged: the weight without the branch. A buffer, so that .to() moves it.
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.unmerged_weight: Tensor | None
        self.reset_lora_parameters()
        if prepack:
            self._prepack_or_warn()

    def reset_lora_parameters(self) -> None:
        """A uniform as `nn.Linear` starts its weight, B zero: the branch starts at zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 8,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        prepack: bool = False,
    ) -> LoRALinear:
        """A LoRA layer around `linear`, whose weight and bias it shares and freezes.

        Args:
            linear: an `nn.Linear`; the parameters stay its own, but no longer require a gradient.
            rank, lora_alpha, lora_dropout, prepack: as in the constructor.
        """
        linear = _checked_linear("LoRALinear.from_linear", linear)
        module = cls(
            linear.in_features, linear.out_features, rank, lora_alpha, lora_dropout, linear.bias is not None,
            device="meta", dtype=linear.weight.dtype,
        )  # fmt: skip
        module.weight, module.bias = linear.weight, linear.bias
        module.weight.requires_grad_(False)
        if module.bias is not None:
            module.bias.requires_grad_(False)
        for name in ("lora_a", "lora_b"):
            setattr(
                module,
                name,
                nn.Parameter(torch.empty_like(getattr(module, name), device=linear.weight.device)),
            )
        module.reset_lora_parameters()
        if prepack:
            module._prepack_or_warn()
        return module.train(linear.training)

    @property
    def scale(self) -> float:
        """lora_alpha / rank."""
        return self.lora_alpha / self.rank

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the branch."""
        return self.unmerged_weight is not None

    def prepack(self) -> str | None:
        """Hold `weight` in packed form, and no longer in plain, where that is faster.

        That is on the CPU, for some 16 to some hundred tokens a call; whether it is, is measured for a second or so at
        the first weight of a kind (`lowrank.prepack.measured`). `weight` stays the same parameter; its entry in a
        state_dict, its copies and what `to` makes of it are plain, bit for bit.

        Returns:
            None, or the reason why it stays plain.
        """
        return packing.prepack(self)

    def unpack(self) -> None:
        """Hold `weight` plain again: the same parameter, every bit of it."""
        packing.unpack(self)

    def _prepack_or_warn(self) -> None:
        reason = self.prepack()
        if reason is not None:
            warnings.warn(f"LoRALinear: prepack=True leaves the weight as it is: {reason}", stacklevel=3)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.merged:
            return super().forward(x)
        dropout_p = self.lora_dropout if self.training else 0.0
        return lora_linear(x, self.weight, self.bias, self.lora_a, self.lora_b, scale=self.scale, dropout_p=dropout_p)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the branch into `weight`: a plain linear layer's speed in inference, no training of A and B.

        The sum is made in float32 (float64 for float64) and rounded once to the weight's dtype. `weight`
        becomes a new parameter; the one from before is kept, for `unmerge`, so that a weight shared with
        other layers is not touched.
        """
        if self.merged:
            return
        weight = self.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        branch = self.lora_b.to(wide) @ self.lora_a.to(wide)
        merged = torch.add(weight.to(wide), branch, alpha=self.scale).to(weight.dtype)
        self._buffers["unmerged_weight"] = weight  # not by setattr, which would make it a parameter again
        self.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)

    def unmerge(self) -> None:
        """Put the weight from before `merge` back: the same parameter, every bit of it."""
        if self.unmerged_weight is None:
            return
        weight, self._buffers["unmerged_weight"] = self.unmerged_weight, None
        if isinstance(weight, PackedWeight):
            weight = weight.parameter()
        elif not isinstance(weight, nn.Parameter):  # .to() makes a plain tensor of it
            weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.weight = weight

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, rank={self.rank}, lora_alpha={self.lora_alpha:g}, "
            f"lora_dropout={self.lora_dropout:g}{', merged' if self.merged else ''}"
            f"{', prepacked' if isinstance(self.weight, PackedWeight) else ''}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.unmerged_weight is not None:
            weight = self.unmerged_weight
            if isinstance(weight, PackedWeight):
                weight = weight.parameter()
            destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.unmerge()
        for ours, loralib in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            if prefix + loralib in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + loralib)
        super()._load_from_state_dict(state_dict, prefix, *rest)
