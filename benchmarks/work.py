"""How much a call has to do at least, and how fast this machine does such work: what a time is held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Arguments, Case, Family, leaves

SMALLEST_COPY = 2**12  # bytes
LARGEST_COPY = {"cpu": 2**27, "cuda": 2**30}  # beyond any cache


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read and written when nothing is read or written twice."""

    flops: float
    bytes: float


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


def count(family: Family, case: Case, arguments: Arguments, output: Tensor, backward: bool) -> Work:
    """The work of one call that returns `output`.

    Forward reads the arguments and writes the output. Backward reads the output's gradient and the arguments again and
    writes their gradients; what it keeps of forward (a bottleneck, statistics) is small beside that and not counted.
    """
    inputs = [value for value in arguments.values() if isinstance(value, Tensor)]
    total = _bytes(inputs) + _bytes([output])
    if backward:
        total += _bytes(inputs) + _bytes([output]) + _bytes(leaves(arguments).values())
    return Work(family.flops(case, arguments, backward), float(total))


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float]:
    """A call of torch.mm, large enough for the device or the threads in use to be near their best, and its operations.

    Where the CPU has no products of 16 bits and torch.mm takes its time over them, the limit is that of float32.
    """
    if device.type == "cuda":
        n = 8192 if dtype.itemsize == 2 else 4096
    else:
        n = 512 if torch.get_num_threads() <= 4 else 2048

    def product(dtype: torch.dtype) -> Callable[[], object]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return lambda: torch.mm(a, b)

    candidates = [product(dtype)]
    if device.type == "cpu" and dtype.itemsize == 2:
        candidates.append(product(torch.float32))
    return min(candidates, key=_seconds) if len(candidates) > 1 else candidates[0], 2.0 * n**3


def _seconds(call: Callable[[], object]) -> float:
    """Of the second call: for choices between what differs many times over."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copy(traffic: float, device: torch.device) -> tuple[Callable[[], object], float]:
    """A copy that reads and writes about `traffic` bytes in all, and its true traffic.

    As many bytes as the call that it is held against, so that both find their data in the same level of the caches.
    """
    size = int(min(max(traffic, SMALLEST_COPY), LARGEST_COPY[device.type])) // 8
    source, target = (torch.ones(size, device=device) for _ in range(2))
    return (lambda: target.copy_(source)), 8.0 * size
