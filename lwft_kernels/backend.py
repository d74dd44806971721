"""Which implementation answers a call: compiled kernels on the CPU, Triton on a GPU, the reference where neither can.

The PyTorch dispatcher picks the kernel of a device; this module only loads the library, lets a user force one
implementation, and counts who answered (`stats`), so that nothing is silently slow.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.compiler import is_compiling

BACKENDS = ("auto", "native", "triton", "reference")

_LIBRARY = Path(__file__).parent / "_C.so"
_PROBE = "add_layer_norm_forward"  # any op of the library tells whether a copy of it is loaded already


class Counts(TypedDict):
    """The calls of one op: how many a fast path served, and how many not, by reason."""

    fast: int
    declined: dict[str, int]


# By op. An eager call on the CPU counts itself here, where a function's own call would be felt.
fast_calls: Counter[str] = Counter()
small_calls: Counter[str] = Counter()  # declined as `SMALL`
_declined: defaultdict[str, Counter[str]] = defaultdict(Counter)


def _load_library() -> str | None:
    """Load `_C.so` and return None, or the sentence that says why the compiled kernels are not there."""
    # A second copy of the same library (a stale build beside an installed one) would end the process.
    if hasattr(torch.ops.lwft, _PROBE):
        return None
    if not _LIBRARY.exists():
        return (
            f"the compiled library {_LIBRARY.name} is not there: reinstall with `pip install .` in an environment "
            "that has torch >= 2.10 and a C++ compiler"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return (
            f"{_LIBRARY.name} was built for another system or torch ({error}); rebuild it with "
            "`pip install --force-reinstall --no-deps .`"
        )
    return None


library_error: str | None = _load_library()
triton_error: str | None = (
    None if importlib.util.find_spec("triton") else "Triton is not installed: pip install 'triton>=3.6'"
)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend = _checked(os.environ.get("LWFT_BACKEND", "auto"))


class use_backend:
    """Choose the implementation by hand, for good or inside a `with` block.

    Args:
        name: ``"auto"`` (compiled kernels where they can, else Triton's, else the reference), ``"native"`` or
            ``"triton"`` (the compiled or the Triton kernels; a call they cannot serve raises ``RuntimeError`` with the
            reason) or ``"reference"`` (plain PyTorch).

    The environment variable ``LWFT_BACKEND`` sets the same at import.
    """

    def __init__(self, name: str) -> None:
        global _backend
        self._previous = _backend
        _backend = _checked(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _backend
        _backend = self._previous


def current_backend() -> str:
    """The name given to `use_backend` last, or ``"auto"``."""
    return _backend


def implementation(op: str, device: torch.device) -> str:
    """Who serves `op` on `device` unless the call itself stands against it: a name of `BACKENDS` but "auto"."""
    if _backend != "auto":
        return _backend
    if why_not_native(op, device) is None:
        return "native"
    return "triton" if why_not_triton(device) is None else "reference"


def why_not(op: str, device: torch.device) -> str | None:
    """The reason why the fast kernels of the chosen backend cannot serve `op` on `device`, or None when they can."""
    native = why_not_native(op, device)
    if _backend == "native" or (_backend == "auto" and (native is None or device.type == "cpu")):
        return native
    return why_not_triton(device)


def why_not_native(op: str, device: torch.device) -> str | None:
    """The reason why the compiled kernels cannot serve `op` on `device`, or None when they can."""
    if library_error is not None:
        return library_error
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        if not has_cuda_kernel(f"{op}_forward"):
            return f"there is no CUDA kernel of {op}"
        # A kernel that has never run on a card stays off until someone asks for it.
        return None if cuda_unproven() else f"no CUDA kernel of {op} has been proven on a GPU yet"
    return f"there are no kernels for the device {device.type}"


def why_not_triton(device: torch.device) -> str | None:
    """The reason why Triton's kernels cannot serve `device`, or None when they can."""
    if triton_error is not None:
        return triton_error
    if device.type == "cpu":
        # for tests of the kernels themselves: nothing is fast there
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "Triton's kernels do not run on the CPU"
    if device.type != "cuda":
        return f"there are no kernels for the device {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton's kernels need a GPU of compute capability 8.0 (Ampere) or later"
    return None


def cuda_unproven() -> bool:
    """Whether someone asks for the CUDA kernels that have never run on a card."""
    return os.environ.get("LWFT_CUDA_UNPROVEN") == "1"


def has_cuda_kernel(name: str) -> bool:
    """Whether the loaded library holds a CUDA kernel of ``lwft::{name}``."""
    return hasattr(torch.ops.lwft_cuda, name)


def by_triton(x: Tensor) -> bool:
    """Whether a call on `x` that the fast kernels serve goes to Triton's; on the CPU only where a test asks for it."""
    return _backend == "triton" if x.is_cpu else not cuda_unproven()


def use_kernels(
    op: str, x: Tensor, declined: str | None = None, triton_limit: Callable[[], str | None] | None = None
) -> bool:
    """Decide and count one call of `op` on `x`: True for the fast kernels, False for the reference.

    Args:
        declined: the caller's own reason not to take a fast kernel.
        triton_limit: asked for a reason only where Triton would serve.
    """
    if _backend == "reference":
        return False
    reason = declined or why_not(op, x.device)
    if _backend == "triton" or (reason is None and not x.is_cpu):
        if x.dtype == torch.float64:
            reason = reason or "on a GPU float64 goes to the reference: the fast kernels compute in float32"
        if reason is None and triton_limit is not None and by_triton(x):
            reason = triton_limit()
    if reason is None:
        record_fast(op)
        return True
    if _backend != "auto":
        raise RuntimeError(f"{op}: backend {_backend!r} was asked for, but {reason}")
    record_decline(op, reason)
    return False


def attempts(x: object) -> bool:
    """Whether a call on `x` is tried with no look at its arguments: an eager one on the CPU, by the compiled kernels.

    The second function of `registration.register` does it. Asked before a random seed is drawn for it.
    """
    return (
        _backend in ("auto", "native")
        and library_error is None
        and isinstance(x, Tensor)
        and x.is_cpu
        and not is_compiling()
        and not torch._C._is_any_autocast_enabled()
    )


SMALL = "so small that PyTorch's own operations take less time"  # as such calls are named in stats()
leave_small_calls = True  # tests of the kernels, whose shapes are small, switch it off


class Small(NamedTuple):
    """The work of the largest call of an op that PyTorch's own operations finish before the op.

    Beside a few microseconds of arithmetic it counts that their autograd is C++ and ours Python: an autograd.Function
    that does nothing takes half the time of a whole small call. The limits are where the kernels begin to win: kernels
    and PyTorch timed in turn, by calls of rising size, float32, on a Xeon with AVX-512; those of add_layer_norm with
    one thread and with two, those of attention with one.
    """

    forward: int  # where no gradient is wanted
    backward: int


def may_be_small() -> bool:
    """Whether a call is left to PyTorch's own operations if it is small: an eager one whose backend nobody named."""
    return leave_small_calls and _backend == "auto" and not is_compiling() and not torch._C._is_any_autocast_enabled()


def wants_gradient(*arguments: Tensor | None) -> bool:
    """Whether autograd is to note a call of these."""
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in arguments)


def record_fast(op: str) -> None:
    """Count one call of `op` that a fast path serves. Not counted while torch.compile traces."""
    if not is_compiling():
        fast_calls[op] += 1


def record_decline(op: str, reason: str) -> None:
    """Count one call of `op` that fell to a slower path, by reason. Not counted while torch.compile traces."""
    if not is_compiling():
        _declined[op][reason] += 1


def stats() -> dict[str, Counts]:
    """Calls since the start or `reset_stats`, by op: ``{"fast": count, "declined": {reason: count}}``."""
    declined = {op: dict(reasons) for op, reasons in _declined.items()}
    for op, count in small_calls.items():
        declined.setdefault(op, {})[SMALL] = count
    return {op: {"fast": fast_calls[op], "declined": declined.get(op, {})} for op in sorted({*fast_calls, *declined})}


def reset_stats() -> None:
    """Set every count of `stats` to zero."""
    fast_calls.clear()
    small_calls.clear()
    _declined.clear()


@contextmanager
def not_counted() -> Iterator[None]:
    """Calls inside leave the counts of `stats` as they were: those of a self-test are not the user's."""
    fast, small = Counter(fast_calls), Counter(small_calls)
    declined = {op: Counter(reasons) for op, reasons in _declined.items()}
    try:
        yield
    finally:
        reset_stats()
        fast_calls.update(fast)
        small_calls.update(small)
        _declined.update(declined)


def describe() -> dict[str, object]:
    """What is loaded and why something is not: for bug reports and `lwft-bench env`."""
    loaded = library_error is None
    return {
        "backend": _backend,
        "library": str(_LIBRARY) if loaded else None,
        "why_not": library_error,
        "cpu_isa": torch.ops.lwft.cpu_isa() if loaded else None,
        "cuda_kernels": loaded and has_cuda_kernel("adapter_forward"),
        "why_not_triton": triton_error,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
