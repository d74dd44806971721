"""The package's one random stream, in PyTorch: the same bits as csrc/common/philox.h.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The draw of the element at
(row, col) depends on (seed, offset, row, col) alone, so no mask is ever stored: backward and checkpointing draw it
again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_COLUMNS, _LANES = 64, 16
_LOW = 0xFFFFFFFF


def is_probability(p: object) -> bool:
    """Whether `p` is a probability beyond question, so that `checks.probability` need not be asked."""
    return type(p) is float and 0.0 <= p <= 1.0


def draw_seed(device: torch.device) -> Tensor:
    """A fresh (seed, offset) from torch's generator of `device`: int64 of shape (2,), on that device."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def _multiply(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * multiplier; int64 holds only 48-bit products, so by 16-bit halves."""
    high = a * (multiplier >> 16)
    low = a * (multiplier & 0xFFFF)
    return (high + (low >> 16)) >> 16, ((high & 0xFFFF) * 65536 + low) & _LOW


def draws(seed: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """32-bit draws of the elements (rows x cols).

    Args:
        seed: int64 (2,): seed and offset, as `draw_seed` gives them.
        rows, cols: int64 of shapes (R,) and (C,).

    Returns:
        int64 (R, C) with values in [0, 2**32).
    """
    rows, cols = rows[:, None], cols[None, :]
    shape = torch.broadcast_shapes(rows.shape, cols.shape)
    c0 = (cols // _COLUMNS * _LANES + cols % _LANES).expand(shape)
    c1 = (rows & _LOW).expand(shape)
    c2 = ((rows >> 32) & _LOW).expand(shape)
    c3 = (seed[1] & _LOW).expand(shape)
    k0, k1 = seed[0] & _LOW, (seed[0] >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    word = (cols % _COLUMNS // _LANES).expand(shape)
    return torch.stack((c0, c1, c2, c3)).gather(0, word[None])[0]


def keep_multiplier(seed: Tensor, rows: Tensor, cols: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies the elements (rows x cols) by: 0 with probability `p`, else 1 / (1 - p).

    Args:
        seed: int64 (2,).
        rows, cols: int64 of shapes (R,) and (C,).
        p: probability of an element to be zeroed, in [0, 1].
        dtype: dtype of the result.

    Returns:
        (R, C) of `dtype`.
    """
    threshold = min(int(p * 2.0**32), 2**32 - 1)
    scale = 0.0 if p >= 1.0 else 1.0 / (1.0 - p)
    return (draws(seed, rows, cols) >= threshold).to(dtype) * scale


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Dropout of a (T, d) matrix from the package's stream: row = token, column = feature."""
    if seed is None or p == 0.0:
        return x
    rows = torch.arange(x.shape[0], device=x.device)
    cols = torch.arange(x.shape[1], device=x.device)
    return x * keep_multiplier(seed, rows, cols, p, x.dtype)
