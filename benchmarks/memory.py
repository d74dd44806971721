"""Memory: the allocator in the state it has in a long run, and the peak of one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

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


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes that `call` holds at its peak above what the process held before, its results included.

    Buffers that a library keeps from earlier calls are not seen; pages of a few hundred kilobytes may be missed. None
    where the system does not tell.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # what earlier calls freed goes back, or this call would get it unseen
        _CLEAR.write_text(_RESET_PEAK)
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None
