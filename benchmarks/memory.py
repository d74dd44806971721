"""Memory: the allocator in the state it has in a long run, the peak of one call, what backward keeps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): clear_refs


_LARGE = 31 * 2**20  # bytes; glibc raises its thresholds for blocks below 32 MiB


def settle_allocator() -> None:
    """Free one large block, as every training process has done before long.

    Until then glibc may hand each block back to the system when it is freed, and a call that makes large tensors is
    timed with their page faults: `add_layer_norm` of 4096 x 768 then takes PyTorch three times as long, ours twice.
    """
    torch.empty(_LARGE, dtype=torch.uint8)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` holds at its peak above what the process held before, its results included.

    On a GPU those of torch's allocator. On the CPU buffers that a library keeps from earlier calls are not seen; pages
    of a few hundred kilobytes may be missed. None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # what earlier calls freed goes back, or this call would get it unseen
        _CLEAR.write_text(_RESET_PEAK)
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def kept_memory(forward: Callable[[], Tensor], device: torch.device) -> int | None:
    """Bytes that `forward` keeps for backward, its output not counted: what a training step pays for a layer.

    None on the CPU, whose allocator does not tell.
    """
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    out = forward()
    return torch.cuda.memory_allocated(device) - before - out.untyped_storage().nbytes()
