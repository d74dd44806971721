"""attention's Triton kernels against the oracle: on a GPU, or on the CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import make
from oracle import check_op

import lwft_kernels
from lwft_kernels import functional as LF

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def ours(**arguments):
    torch.manual_seed(0)
    return LF.attention(**arguments)


def reference(**arguments):
    torch.manual_seed(0)
    with lwft_kernels.use_backend("reference"):
        return LF.attention(**arguments)


def check(device, arguments, dtype=torch.float32, **options):
    placed = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().to(device).requires_grad_(value.requires_grad)
        placed[name] = value
    check_op(ours, reference, placed, dtype, **options)


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 1, 0, 5, 8),  # no tokens
        (2, 2, 1, 3, 0, 16),  # no keys
        (0, 2, 2, 4, 4, 8),  # no sequences
        (1, 1, 1, 1, 1, 1),
        (2, 3, 3, 7, 5, 33),
        (1, 6, 2, 19, 83, 80),  # grouped heads
        (1, 2, 2, 130, 131, 64),
        (1, 3, 1, 9, 77, 16),
        (1, 4, 2, 1, 1100, 64),  # decoding
        (1, 1, 1, 11, 9, 200),
    ],
    ids=str,
)
def test_accuracy(triton_device, shape, dtype):
    check(triton_device, make(*shape), dtype, backward=False)


@pytest.mark.parametrize("queries,keys", [(70, 70), (33, 150), (60, 21)], ids=str)
@pytest.mark.parametrize(
    "rule",
    [
        {"causal": True},
        {"causal": True, "window": 5},
        {"window": 40},
        {"window": 2**62},
        {"softcap": 2.0, "causal": True},
        {"scale": -1.0},
        {"causal": True, "prefix": 6},
        {"causal": True, "window": 30, "prefix": 140, "shared_prefix": False},
    ],
    ids=str,
)
def test_rules(triton_device, rule, queries, keys):
    check(triton_device, make(1, 4, 2, queries, keys, 32, **rule), backward=False)


@every_dtype
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("queries,prefix", [(1, 5), (40, 0), (40, 70)])
def test_dropout(triton_device, queries, prefix, p, dtype):
    check(
        triton_device, make(2, 4, 2, queries, 145, 16, prefix=prefix, causal=True, dropout_p=p), dtype, backward=False
    )
