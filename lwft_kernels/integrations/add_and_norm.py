"""The end of a sublayer, norm(residual + dropout(sublayer_out)), for the rooms whose modules end so."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lwft_kernels import backend, checks, registration
from lwft_kernels import functional as LF
from lwft_kernels.integrations import reached
from lwft_kernels.integrations.class_swap import PLAIN, has_hooks, is_plain

_OP = "residual and LayerNorm"  # as declined calls are named in stats()


def add_and_norm(
    owner: nn.Module, residual: Tensor, sublayer_out: Tensor, dropout: nn.Module | None, norm: nn.Module
) -> Tensor:
    """norm(residual + dropout(sublayer_out)) by `add_layer_norm`, or by the modules themselves.

    Args:
        owner: the replaced module that computes it, which counts as reached when the op does.
        residual, sublayer_out: (..., d).
        dropout: the module that drops elements of `sublayer_out`; None where there is none.
        norm: the module that normalises.
    """
    reason = _why_not(residual, sublayer_out, dropout, norm)
    if reason is not None:
        backend.record_decline(_OP, reason)
        if dropout is not None:
            sublayer_out = dropout(sublayer_out)
        declined: Tensor = norm(residual + sublayer_out)
        return declined
    assert isinstance(norm, nn.LayerNorm)
    reached.mark(owner)
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return LF.add_layer_norm(residual, sublayer_out, norm.weight, norm.bias, norm.eps, dropout_p=p)


def _why_not(residual: Tensor, sublayer_out: Tensor, dropout: nn.Module | None, norm: nn.Module) -> str | None:
    """Why the op cannot stand for the modules in this call, or None."""
    if type(norm) is not nn.LayerNorm:
        return f"the norm is a {type(norm).__name__}"
    if dropout is not None and type(dropout) is not nn.Dropout:
        return f"the dropout is a {type(dropout).__name__}"
    if has_hooks(norm) or (dropout is not None and has_hooks(dropout)):
        return "the norm or the dropout has hooks"
    if len(norm.normalized_shape) != 1:
        return "the norm is over several dimensions"
    if type(residual) not in PLAIN or type(sublayer_out) not in PLAIN or residual.is_nested or sublayer_out.is_nested:
        return "the input is not a plain tensor"
    if residual.shape != sublayer_out.shape or residual.shape[-1:] != norm.normalized_shape:
        return "the shapes differ"
    if residual.dtype not in checks.FLOATING or sublayer_out.dtype not in checks.FLOATING:
        return f"a sum of {residual.dtype} and {sublayer_out.dtype}"
    total = torch.promote_types(residual.dtype, sublayer_out.dtype)
    parameters: tuple[Tensor | None, ...] = (norm.weight, norm.bias)
    for parameter in parameters:
        if parameter is None:
            continue
        if not is_plain(parameter):
            return "the norm's parameters are sharded or of a tensor subclass"
        if parameter.dtype not in (total, torch.float32):
            return f"a norm of {parameter.dtype} on a sum of {total}"
    if not torch.compiler.is_compiling() and registration.transforms_active():
        return "a torch.func transform or forward-mode AD is under way"
    if backend.current_backend() == "reference":
        return None
    return backend.why_not("add_layer_norm", residual.device)
