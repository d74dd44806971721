"""Tensors before a page that may not be touched: a kernel that reads or writes past the end ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NO_ACCESS = 0


def guarded(value: Tensor) -> Tensor:
    """A contiguous copy on the CPU whose last byte is the last of a page; the pages on both sides fault.

    The memory is never given back: for tests of a few tensors.
    """
    page = mmap.PAGESIZE
    size = value.numel() * value.element_size()
    room = max(-(-size // page), 1) * page
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _libc.mmap(None, room + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    for wall in (start, start + page + room):
        if _libc.mprotect(wall, page, _NO_ACCESS) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    if size == 0:
        return torch.empty(value.shape, dtype=value.dtype)
    memory = (ctypes.c_char * size).from_address(start + page + room - size)
    copy = torch.frombuffer(memory, dtype=value.dtype).view(value.shape)
    return copy.copy_(value.detach())
