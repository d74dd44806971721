"""Packing frozen weights where that is faster: decided by a measurement, made once and kept on disk.

A vendor's matrix product packs the weight anew at every call. From a few tokens up to a few hundred that costs much of
the call; beyond, where it costs nothing, there is little to gain. How much depends on the machine, the library and the
number of threads, so it is measured: when a weight is to be packed, never later.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lwft_kernels import backend
from lwft_kernels.lowrank.packed_weight import PackedWeight, hold_packed, hold_plain

# Tokens for which a packed weight is meant, and those of a large batch, for the record.
_TOKENS, _MANY_TOKENS = (16, 64, 128), 1024
# By how much forward and backward of `lora_linear` must be faster, in the geometric mean over _TOKENS.
_LEAST_GAIN = 1.1
_LEAST_SIDE, _LARGEST_SIDE = 256, 4096  # of the weights that are measured: a larger one is as far from any cache

Gains = dict[str, float]  # by the number of tokens: the time with the plain weight over that with the packed one
_known: dict[str, Gains] = {}


def prepack(linear: nn.Linear) -> str | None:
    """Hold the weight of `linear` in packed form alone, where that is faster.

    Everything about the layer stays as it was: `linear.weight` is the same object, now a `PackedWeight`. The first call
    for a kind of weight measures for a second or so; `measured` has the result.

    Returns:
        None, or the reason why the weight stays plain.
    """
    reason = why_not(linear)
    if reason is not None:
        return reason
    gain = _mean(measured(linear.weight))
    if gain < _LEAST_GAIN:
        return f"packed it would be {gain:.2f} times as fast here (measured; {_LEAST_GAIN} is the least)"
    try:
        hold_packed(linear)
    except RuntimeError as error:
        return f"its weight cannot be exchanged: {error}"
    return None


def unpack(linear: nn.Linear) -> None:
    """Undo `prepack`: the same object, the same bits."""
    hold_plain(linear)


def why_not(linear: nn.Linear) -> str | None:
    """Why the weight of `linear` cannot be packed, whatever the speed, or None."""
    weight: Any = linear.weight
    if type(weight) is PackedWeight:
        return "its weight is packed already"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if weight.requires_grad:
        return "its weight requires a gradient; only a frozen one can be packed: weight.requires_grad_(False)"
    if backend.library_error is not None:
        return backend.library_error
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}; only the CPU has a product with packed weights"
    if not weight.is_contiguous() or weight.untyped_storage().nbytes() != weight.nbytes:
        return "its weight shares its memory with other tensors"
    if weight.dtype == torch.float16 or torch.ops.lwft.packed_weight_bytes(weight) == 0:
        level = torch.ops.lwft.cpu_isa()
        return f"the instruction-set level {level} has no product with a packed weight of {weight.dtype}"
    return None


def measured(weight: Tensor) -> Gains:
    """How many times as fast `lora_linear` is with a packed weight like `weight`, forward and backward, by tokens.

    Measured once for each processor, instruction-set level, release of torch and of this package, number of threads,
    dtype and power of two that the sizes are next to. The results are kept in the file that the environment variable
    ``LWFT_PREPACK_CACHE`` names, else ``lwft_kernels/prepack.json`` under ``$XDG_CACHE_HOME`` (``~/.cache``); `forget`
    deletes them.
    """
    d_out, d_in = (_band(size) for size in weight.shape)
    key = _key(d_out, d_in, weight.dtype)
    if key not in _known:
        _known.update(_read())
    if key not in _known:
        _known[key] = _measure(d_out, d_in, weight.dtype)
        _write({**_read(), key: _known[key]})
    return _known[key]


def forget() -> None:
    """Delete what was measured: the next `prepack` measures again."""
    _known.clear()
    _file().unlink(missing_ok=True)


def described(gains: Gains) -> str:
    """The measurement in a few words."""
    return (
        f"{_mean(gains):.2f}x at {_TOKENS[0]}..{_TOKENS[-1]} tokens, {gains[str(_MANY_TOKENS)]:.2f}x at {_MANY_TOKENS}"
    )


def _mean(gains: Gains) -> float:
    return float(2 ** (sum(log2(gains[str(tokens)]) for tokens in _TOKENS) / len(_TOKENS)))


def _band(size: int) -> int:
    return min(max(1 << round(log2(max(size, 1))), _LEAST_SIDE), _LARGEST_SIDE)


def _key(d_out: int, d_in: int, dtype: torch.dtype) -> str:
    from lwft_kernels import __version__

    return (
        f"{_processor()}, {torch.ops.lwft.cpu_isa()}, torch {torch.__version__}, lwft_kernels {__version__}, "
        f"{torch.get_num_threads()} threads, {dtype}, {d_out} x {d_in}"
    )


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    return found[0] if found else platform.processor() or platform.machine()


def _file() -> Path:
    chosen = os.environ.get("LWFT_PREPACK_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lwft_kernels" / "prepack.json"


def _read() -> dict[str, Gains]:
    try:
        found = json.loads(_file().read_text())
        # what somebody else wrote there is as good as nothing
        wanted = {str(tokens) for tokens in (*_TOKENS, _MANY_TOKENS)}
        return {k: v for k, v in found.items() if v.keys() == wanted and all(type(x) is float for x in v.values())}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(results: dict[str, Gains]) -> None:
    file = _file()
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(results, indent=1))
        part.replace(file)  # at once: another process may be reading
    except OSError:  # nowhere to keep it: it is known in this process
        pass


@torch.no_grad()
def _measure(d_out: int, d_in: int, dtype: torch.dtype) -> Gains:
    """By the op itself, with a small adapter."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rank = 8
    weight, a, b = normal(d_out, d_in), normal(rank, d_in), normal(d_out, rank)
    packed = torch.ops.lwft.pack_weight(weight)
    gains = {}
    for tokens in (*_TOKENS, _MANY_TOKENS):
        x, grad = normal(tokens, d_in), normal(tokens, d_out)

        def both_ways(w: Tensor, x: Tensor = x, grad: Tensor = grad) -> None:
            _, hidden = torch.ops.lwft.lora_linear_forward(x, w, None, a, b, None, None, 1.0, 0.0)
            only_dx = 1
            torch.ops.lwft.lora_linear_backward(grad, x, w, a, b, hidden, None, None, 1.0, 0.0, only_dx)

        gains[str(tokens)] = _ratio(lambda: both_ways(weight), lambda: both_ways(packed))
    return gains


def _ratio(first: Callable[[], None], second: Callable[[], None]) -> float:
    """The time of `first` over that of `second`: medians, the two taking turns."""
    times: tuple[list[float], list[float]] = ([], [])
    least_turns, enough = 3, 0.15  # seconds
    for turn in range(15):
        for call, mine in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            if turn > 0:  # the first ones warm up
                mine.append(time.perf_counter() - start)
        if turn >= least_turns and sum(map(sum, times)) > enough:
            break
    before, after = (sorted(mine)[len(mine) // 2] for mine in times)
    return before / after
