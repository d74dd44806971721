"""Peak memory of one call, by the high-water mark that Linux keeps of a process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): clear_refs


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
