"""Gives a kernel pair ``lwft::<op>_forward`` / ``lwft::<op>_backward`` its shapes, its gradient and its GPU kernels.

The autograd formula of an op is written once, in its room, and used twice: by `torch.library.register_autograd`, which
torch.compile and torch.export trace, and by a thin `torch.autograd.Function` in eager, which halves the overhead.

The library defines the ops and holds their CPU kernels. For a GPU they are registered here: the room's Triton kernels,
imported at the first call. Where there is no library, the ops are defined here too, from the signatures of their fakes.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lwft_kernels import backend

Formula = Callable[..., Any]


def transforms_active() -> bool:
    """Whether a `torch.func` transform or forward-mode AD is under way, which the ops have no rules for."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _has_tangent(args: Sequence[Any]) -> bool:
    return any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args)


@functools.cache
def wanted(needs_input_grad: tuple[bool, ...], positions: tuple[int, ...]) -> int:
    """The `needs` bits of a backward op: bit i is set when the input at positions[i] wants a gradient."""
    needs = 0
    for bit, position in enumerate(positions):
        if needs_input_grad[position]:
            needs |= 1 << bit
    return needs


def gradients(results: Sequence[Tensor], needs: int) -> list[Tensor | None]:
    """A backward op's results with None for those that were not wanted (they come back empty)."""
    if needs == (1 << len(results)) - 1:
        return list(results)
    return [result if needs >> bit & 1 else None for bit, result in enumerate(results)]


def define(name: str, fake: Formula, mutates: tuple[str, ...] = ()) -> None:
    """Define ``lwft::{name}``, with the arguments of its fake, where the library has not done it."""
    if not hasattr(torch.ops.lwft, name):
        torch.library.define(f"lwft::{name}", torch.library.infer_schema(fake, mutates_args=mutates))


_triton_kernels: dict[str, Formula] = {}


def run_triton(name: str, *args: Any) -> Any:
    """Call the Triton kernels of ``lwft::{name}`` past the dispatcher, which costs more than a small launch."""
    return _triton_kernels[name](*args)


def register_triton(name: str, module: str) -> None:
    """Let the function `name` of `module` serve ``lwft::{name}`` on a GPU. It is imported at the first call."""
    found: list[Formula] = []
    op = re.sub(r"_(forward_?|backward)$", "", name)

    def run(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(module), name))
        x = args[0]
        # Triton launches on the current device, which need not be that of the tensors.
        other = x.is_cuda and x.device.index != torch.cuda.current_device()
        with torch.cuda.device(x.device) if other else nullcontext():
            return found[0](*args)

    def on_gpu(*args: Any) -> Any:
        if not backend.by_triton(op, args[0]) and backend.has_cuda_kernel(name):
            try:
                return getattr(torch.ops.lwft_cuda, name)(*args)
            except RuntimeError as error:
                reason = re.search(r"the CUDA kernel declines: (.*)", str(error))
                if reason is None:
                    raise
                backend.record_decline(f"{name} in CUDA C++", reason[1])
        return run(*args)

    _triton_kernels[name] = run
    torch.library.impl(f"lwft::{name}", "CUDA")(on_gpu)


_backward_ops: dict[str, Any] = {}  # looking one up in torch.ops takes as long as a small product


def run_backward(op: str, *args: Any) -> Any:
    """Call ``lwft::{op}_backward`` from a formula's backward."""
    backward_op = _backward_ops.get(op)
    if backward_op is None:
        backward_op = _backward_ops[op] = getattr(torch.ops.lwft, f"{op}_backward").default
    # Autograd has something to say (that there is no second derivative) only when it is asked for one.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return backward_op(*args)
    if backend.by_triton(op, args[0]):
        return run_triton(f"{op}_backward", *args)
    with torch._C._AutoDispatchBelowAutograd():
        return backward_op(*args)


def _no_double_backward(op: str) -> Formula:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"lwft_kernels.{op} has no second derivative: differentiate once (create_graph=False), or compute this "
            "part with lwft_kernels.use_backend('reference')"
        )

    return backward


def register(
    op: str,
    *,
    forward_fake: Formula,
    backward_fake: Formula,
    setup_context: Formula,
    backward: Formula,
    triton: str,
    differentiable_outputs: int = 1,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register shapes and gradient of `op` and return the functions that call it.

    Args:
        op: name; the library defines ``lwft::{op}_forward`` and ``lwft::{op}_backward``.
        forward_fake, backward_fake: the shapes of the results, as `torch.library.register_fake` wants them.
        setup_context, backward: the formula, as `torch.library.register_autograd` wants it.
        triton: the module whose functions ``{op}_forward`` and ``{op}_backward`` serve a GPU.
        differentiable_outputs: the first so many results of forward carry gradients; the rest are statistics kept for
            backward.

    Returns:
        Two functions of the forward op's arguments, all positional, that return the differentiable results: the tensor
        where there is one, else a tuple. The first serves every call. The second is for what `backend.attempts`: it
        calls the compiled kernel with no look at the arguments, and returns None where the op refuses them.
    """
    define(f"{op}_forward", forward_fake)
    define(f"{op}_backward", backward_fake)
    for name in (f"{op}_forward", f"{op}_backward"):
        register_triton(name, triton)
    forward_by_triton = _triton_kernels[f"{op}_forward"]
    forward_op = getattr(torch.ops.lwft, f"{op}_forward").default
    inference_op = getattr(torch.ops.lwft, f"{op}_inference", None)  # of the library, for the CPU
    alone = len(forward_op._schema.returns) == 1  # nothing is kept for backward: the result is no tuple

    def shapes(*args: Any) -> Any:
        # an argument on the meta device among real ones brings the call here, past the kernel that would refuse it
        if len({a.device for a in args if isinstance(a, Tensor)}) > 1:
            raise RuntimeError(f"lwft::{op}_forward: the arguments lie on different devices")
        return forward_fake(*args)

    torch.library.register_fake(f"lwft::{op}_forward", shapes)
    torch.library.register_fake(f"lwft::{op}_backward", backward_fake)

    def results(output: Any) -> Any:
        if alone:
            return output
        return output[0] if differentiable_outputs == 1 else output[:differentiable_outputs]

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        # a loss that uses one result only must not make backward read zeros for the other
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def setup_traced(ctx: Any, inputs: Any, output: Any) -> None:
        if not alone:
            ctx.mark_non_differentiable(*output[differentiable_outputs:])
        setup(ctx, inputs, output)

    if inference_op is not None:
        torch.library.register_fake(f"lwft::{op}_inference", lambda *args: results(shapes(*args)))
    torch.library.register_autograd(f"lwft::{op}_forward", backward, setup_context=setup_traced)
    torch.library.register_autograd(f"lwft::{op}_backward", _no_double_backward(op))

    def below_autograd(*args: Any) -> Any:
        if backend.by_triton(op, args[0]):
            return forward_by_triton(*args)
        # past the formula registered above, which would only find that no gradient is wanted
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*args)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = below_autograd(*args)
            ctx.set_materialize_grads(False)
            setup_context(ctx, args, output)
            # not the statistics: each result more costs autograd a microsecond here and one in backward
            return results(output)

    Eager.backward = staticmethod(backward)  # type: ignore[method-assign]
    Eager.__name__ = Eager.__qualname__ = op
    # Function.apply in C: the Python one above it unwraps functorch's tensors, which `call` has refused already
    apply = super(torch.autograd.Function, Eager).apply

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return results(forward_op(*args))
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"lwft_kernels.{op} does not work under torch.func transforms (grad, vmap, ...): use torch.autograd, "
                "or lwft_kernels.use_backend('reference')"
            )
        # below autograd a tangent would be lost without a word
        if forward_ad._current_level >= 0 and _has_tangent(args):
            raise NotImplementedError(
                f"lwft_kernels.{op} has no forward-mode derivative: use backward, or "
                "lwft_kernels.use_backend('reference')"
            )
        return apply(*args) if torch.is_grad_enabled() else results(below_autograd(*args))

    def infer_by_forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return results(forward_op(*args))

    # without the Python of an OpOverload's own __call__
    infer = infer_by_forward if inference_op is None else inference_op.default._op

    def attempt(*args: Any) -> Any:
        # Looking at every argument costs more than a small call. So the op is called first: it refuses what does not go
        # together before it computes anything, and the caller, given None, looks for what it is.
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return None
        try:
            result = apply(*args) if torch.is_grad_enabled() else infer(*args)
        except (RuntimeError, TypeError, AttributeError):
            return None
        backend.fast_calls[op] += 1
        return result

    return call, attempt
