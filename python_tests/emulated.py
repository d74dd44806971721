"""What the tests of emulated CUDA kernels share: arrays as the kernels take them, and the orders of execution."""

from __future__ import annotations

import itertools

import numpy as np
import torch

# the order in which threads run, and whether asynchronous copies land at once or at the wait
MODES = list(itertools.product(("round_robin", "greedy", "greedy_reversed"), (False, True)))


def to_numpy(tensor):
    """numpy has no bfloat16: its bits travel as uint16. On addresses that the kernels' vector loads need."""
    array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    memory = np.empty(array.size + 8, array.dtype)
    start = -memory.ctypes.data % 16 // array.itemsize
    aligned = memory[start : start + array.size].reshape(array.shape)
    aligned[...] = array
    return aligned


def to_torch(array):
    found = torch.from_numpy(array)
    return found.view(torch.bfloat16) if array.dtype == np.uint16 else found
